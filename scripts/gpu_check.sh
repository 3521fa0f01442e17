#!/usr/bin/env bash
# Checks and times the library on a CUDA machine that has Python and jax, and perhaps no network; eight minutes at most.
#   scripts/gpu_check.sh --prepare DIR                 # before, with network, the same Python: wheels of what is missing
#   scripts/gpu_check.sh [--wheels DIR] [--out FOLDER]  # there; writes one JSON per check to FOLDER (results/gpu)
#   scripts/gpu_check.sh --tiny [--wheels DIR]          # tiny models, on any device: does the script itself work?
# PyTorch is timed beside where it is installed. PYTHON names another interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}" wheels="" out="results/gpu" tiny=""
while [ $# -gt 0 ]; do
  case "$1" in
    --prepare)
      mkdir -p "${2:?--prepare needs a folder}"
      # jax and numpy are the machine's own; a wheel of another Python would not install.
      "$python" -m pip download --quiet --dest "$2" --only-binary=:all: \
        flax optax orbax-checkpoint chex ml-collections safetensors "etils[epath]" absl-py hypothesis pytest || exit 1
      rm -f "$2"/jax-* "$2"/jaxlib-* "$2"/numpy-* "$2"/scipy-* "$2"/ml_dtypes-*
      echo "$(find "$2" -name '*.whl' | wc -l) wheels in $2"
      exit 0 ;;
    --wheels) wheels="$(cd "$2" && pwd)" || exit 2; shift 2 ;;
    --out) out="$2"; shift 2 ;;
    --tiny) tiny="--tiny"; shift ;;
    *) echo "unknown option $1: see the head of scripts/gpu_check.sh"; exit 2 ;;
  esac
done

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/site"
"$python" -c 'import jax' 2>/dev/null || { echo "$python has no jax: name one that has in PYTHON"; exit 1; }
if [ -n "$wheels" ]; then  # only what is missing, and beside what there is
  missing="$("$python" - "$wheels" <<'PY'
import importlib.metadata, pathlib, sys
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
PY
)"
  for wheel in $missing; do "$python" -m zipfile -e "$wheel" "$work/site"; done
fi
export PYTHONPATH="$PWD:$work/site${PYTHONPATH:+:$PYTHONPATH}"
export JAX_COMPILATION_CACHE_DIR="$work/cache" TF_CPP_MIN_LOG_LEVEL=2
export JAX_DEFAULT_MATMUL_PRECISION=highest  # of float32 checks; bench below has its own
end=$((SECONDS + 480)) failed=0 told=""
[ -n "$tiny" ] && end=$((SECONDS + 1500))  # on a processor that may be busy

check() {  # NAME SECONDS COMMAND...: the last line that it prints is JSON
  local name="$1" limit="$2" began=$SECONDS
  shift 2
  [ -n "$tiny" ] && limit=300
  [ $((end - SECONDS)) -lt "$limit" ] && limit=$((end - SECONDS))
  if [ "$limit" -lt 5 ]; then echo "$name: no time left"; failed=1; told="$told $name=0"; return; fi
  if timeout "$limit" "$@" >"$work/$name.log" 2>"$work/$name.err"; then
    echo "$name: ok, $((SECONDS - began)) s" && told="$told $name=1"
  else
    echo "$name: FAILED after $((SECONDS - began)) s: $(tail -n 1 "$work/$name.err")"
    failed=1 told="$told $name=0"
  fi
  if tail -n 1 "$work/$name.log" | grep -q '^[[{]'; then tail -n 1 "$work/$name.log" >"$out/$name.json"; fi
}

"$python" -c 'import jax; print("jax", jax.__version__, "on", jax.devices()[0].platform, jax.devices()[0].device_kind)'
if [ -n "$tiny" ]; then  # bound by compiling
  export XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  size=(--set width=8 --set depth=2 --set heads=2 --img_size=32 --pairs=2 --batch=1,2)
  at=(--at=1) dense=deit_tiny_patch16_224
  cases=(tests/golden/cases/dtps_*) exits=(dvt_vit_mini --set img_size=14 --set width=8 --set depth=1 --set heads=1 --set exits=1,2 --exits=80,20 --batch=4 --pairs=1)
  dtype=float32
else
  size=(--pairs=7 --batch=1,32,256) at=() dense=deit_small_patch16_224
  cases=(tests/golden/cases/*) exits=(dvt_deit_small --exits=80,15,5 --batch=64 --pairs=5 --dtype=bfloat16)
  dtype=bfloat16
fi
check methods 90 "$python" scripts/gpu_check.py methods $tiny
check golden 120 "$python" -m tests.golden "${cases[@]}"
check train 90 "$python" scripts/gpu_check.py train $tiny
unset JAX_DEFAULT_MATMUL_PRECISION
peers=()
"$python" -c 'import torch' 2>/dev/null && peers=(--vs-torch)
[ ${#peers[@]} -gt 0 ] && [ -z "$tiny" ] && peers+=(--vs-torch-compile)
check dense 120 "$python" -m dyntoken.tools.bench "$dense" "${size[@]}" --dtype=$dtype --profile "${peers[@]}" --json
for method in dynamicvit dtps evit etps; do
  check "$method" 75 "$python" -m dyntoken.tools.bench "${method}_$dense" "${size[@]}" "${at[@]}" --dtype=$dtype --json
done
check exits 75 "$python" -m dyntoken.tools.bench_exits "${exits[@]}" --json
"$python" - "$out/summary.json" $told <<'PY'
import json, sys, jax
passed = {name: ok == "1" for name, ok in (word.split("=") for word in sys.argv[2:])}
about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "platform": jax.default_backend()}
open(sys.argv[1], "w").write(json.dumps({**about, "passed": passed}, indent=1) + "\n")
PY
echo "$SECONDS s, results in $out"
exit $failed
