#!/usr/bin/env bash
# jax 0.10.2, two CPU processes: gloo greets on *stdout*, in pieces, whatever the log level.
# Expected: a library says such things on stderr or by the level of its log (TF_CPP_MIN_LOG_LEVEL=3 asks for fatal
# errors only). So a program of several processes whose last line is JSON has other lines between its own.
set -euo pipefail
unset PYTHONPATH
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$work/one.py" <<'PY'
import sys
import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]), cluster_detection_method="deactivate")
total = multihost_utils.process_allgather(jnp.ones(1)).sum()
print("sum", int(total), flush=True)
PY
port=$("$work/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3
for i in 0 1; do
  timeout 120 "$work/venv/bin/python" "$work/one.py" "$port" $i >"$work/out$i" 2>"$work/err$i" &
  pids[$i]=$!
done
wait "${pids[0]}"; wait "${pids[1]}"
echo "stdout of process 0:"; cat "$work/out0"
grep -q "^sum 2" "$work/out0"
if cat "$work/out0" "$work/out1" | grep -q "Gloo\] Rank" && ! cat "$work/err0" "$work/err1" | grep -q "Gloo"; then
  echo "holds: jax 0.10.2 has gloo write its greeting to stdout"
else
  echo "changed: no greeting on stdout"; exit 1
fi
