#!/usr/bin/env bash
# jax 0.12.0.1: the gradient of lax.erf (and so of exact GELU) inside jax.shard_map ends with a ValueError, "Primitive
# polynomial requires varying manual axes to match"; the value is right, and so is everything with jax 0.11.2.
# Expected: the gradient, as in 0.11.2, whose check_vma is on by default as well. Needs Python 3.12 or newer (PYTHON=...).
set -euo pipefail
unset PYTHONPATH
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for python in "${PYTHON:-python3}" python3.12 python3.13 "$(pyenv root 2>/dev/null || true)"/versions/3.1[23]*/bin/python; do
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
"$python" -m venv "$work/venv" || { echo "no Python 3.12 or newer: give one as PYTHON=..."; exit 2; }
cat >"$work/try.py" <<'PY'
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = jnp.linspace(0.1, 0.9, 4)


def outcome(f):
    try:
        y = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(x)
    except ValueError as error:
        return f"ValueError: {str(error)[:60]}"
    return "right" if bool(jnp.allclose(y, f(x))) else "wrong"


value = outcome(jax.lax.erf)
gradient = outcome(jax.grad(lambda y: jax.lax.erf(y).sum()))
print(f"jax {jax.__version__}: value {value}, gradient {gradient}")
PY
install() { "$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@" 2>&1 | grep -v '^WARNING' || true; }
install jax==0.11.2 jaxlib==0.11.2
"$work/venv/bin/python" "$work/try.py" | tee "$work/old"
install jax==0.12.0.1 jaxlib==0.12.0.1
"$work/venv/bin/python" "$work/try.py" | tee "$work/new"
grep -q "value right, gradient right" "$work/old" || { echo "changed: 0.11.2 differs"; exit 1; }
grep -q "value right, gradient ValueError: Primitive polynomial" "$work/new" || { echo "changed: 0.12.0.1 differs"; exit 1; }
echo "holds: jax 0.12.0.1 cannot differentiate erf inside shard_map, jax 0.11.2 can"
