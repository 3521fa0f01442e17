#!/usr/bin/env bash
# Resolves every extra alone, and all of them together, as pip would install them; installs nothing.
#   scripts/check_extras.sh [EXTRA[,EXTRA...]...]
set -euo pipefail
cd "$(dirname "$0")/.."

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet --upgrade pip  # from 25 on a dry run reads descriptions only, no whole wheels

extras() {  # by the package's own description, so that a new one is not forgotten
  pip install --quiet --dry-run --no-deps --ignore-installed --report - . 2>/dev/null |
    python3 -c 'import json, sys; print(*json.load(sys.stdin)["install"][0]["metadata"]["provides_extra"])'
}

if [ $# -gt 0 ]; then sets=("$@"); else
  read -ra sets <<<"$(extras)"
  [ ${#sets[@]} -gt 0 ] || { echo "no extras found"; exit 1; }
  sets+=("$(IFS=,; echo "${sets[*]}")")
fi
failed=0
for one in "${sets[@]}"; do
  began=$SECONDS
  if pip install --quiet --dry-run ".[$one]" >"$work/log" 2>&1; then
    echo "[$one] resolves, $((SECONDS - began)) s"
  else
    echo "[$one] cannot be installed:"
    grep -v '^WARNING' "$work/log" | tail -15
    failed=1
  fi
done
exit $failed
