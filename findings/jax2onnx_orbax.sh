#!/usr/bin/env bash
# jax2onnx 0.17.1 cannot be installed beside orbax-checkpoint 0.12.8: it asks for an older one.
# Expected: an exporter, which reads no checkpoints, lives beside the current release of what writes them.
set -euo pipefail
unset PYTHONPATH
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check install --dry-run --quiet "$@"; }
pip orbax-checkpoint==0.12.8 jax==0.10.2 flax==0.12.8 && echo "orbax-checkpoint 0.12.8 alone: resolves"
if pip jax2onnx==0.17.1 orbax-checkpoint==0.12.8 >"$work/log" 2>&1; then
  echo "changed: both resolve"; exit 1
fi
grep -E "conflict|ResolutionImpossible" "$work/log" | head -3
grep -q "ResolutionImpossible" "$work/log"
echo "holds: jax2onnx 0.17.1 and orbax-checkpoint 0.12.8 exclude each other"
