#!/usr/bin/env bash
# jax 0.10.2: the derivative of |x| at 0 is 1.
#
# Expected: 0, as torch and TensorFlow have it, and as sign(0) = 0; jax's own abs' = sign for all other x.
# Seen: jnp.abs and jnp.linalg.norm of order 1 have a gradient of 1 at exactly 0, also at -0.0 (relu's is 0). So what
# an L1 term has already met is pushed: a gate or pruned weight at 0 is stepped off it, |share - target| does not rest
# at its target, and pairs of masked entries (0 against 0) each send a gradient of 1.
# Remedy: x * jax.lax.stop_gradient(jnp.sign(x)).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp

print("jax", jax.__version__)
zeros = jnp.array([0.0, -0.0, 2.0, -2.0])
seen = {
    "sign": jnp.sign(zeros).tolist(),
    "gradient of sum |x|": jax.grad(lambda x: jnp.abs(x).sum())(zeros).tolist(),
    "gradient of norm(x, 1)": jax.grad(lambda x: jnp.linalg.norm(x, 1))(zeros).tolist(),
    "gradient of relu": jax.grad(lambda x: jax.nn.relu(x).sum())(zeros).tolist(),
}
for name, value in seen.items():
    print(name, value)
assert seen["sign"] == [0.0, 0.0, 1.0, -1.0]
assert seen["gradient of sum |x|"] == [1.0, 1.0, 1.0, -1.0], "the gradient of abs at 0 is another now"

assert seen["gradient of relu"] == [0.0, 0.0, 1.0, 0.0]
remedy = jax.grad(lambda x: (x * jax.lax.stop_gradient(jnp.sign(x))).sum())(zeros)
print("gradient of sum x * stop_gradient(sign(x))", remedy.tolist())
gate, steps = jnp.zeros(()), []
for _ in range(4):
    gate = gate - 0.1 * jax.grad(jnp.abs)(gate)
    steps.append(round(float(gate), 3))
print("a gate that starts at 0, in steps of 0.1 on |gate|:", steps)
print("holds: jax's |x| has a derivative of 1 at 0")
PY
