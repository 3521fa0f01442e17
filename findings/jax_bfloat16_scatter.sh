#!/usr/bin/env bash
# jax 0.10.2 on a CPU: sums by index in bfloat16 stop at 256; other sums do not.
#
# Expected: jax.ops.segment_sum and .at[].add of 1,000 ones in bfloat16 give 1,000, as jnp.sum, a product with a one-hot
# matrix and the gradient of a broadcast do (all of these accumulate in float32 and round once).
# Seen: 256, as each addition is rounded: 256 + 1 has no bfloat16. So a segment mean of 1,000 equal tokens is
# 0.256 of the token (or 1, if the count is taken so, too, and stalls likewise), and the gradient of a gather whose rows
# are read often (an embedding, a table of relative positions, one host of many tokens) is cut. torch's index_add_ does
# the same. Remedy: cast to float32 before, or multiply by a one-hot matrix.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp

print("jax", jax.__version__, jax.default_backend())
n = 1000
ones, first = jnp.ones(n, jnp.bfloat16), jnp.zeros(n, jnp.int32)
one_hot = jax.nn.one_hot(first, 1, dtype=jnp.bfloat16)
seen = {
    "sum": jnp.sum(ones),
    "product with one-hot": (ones @ one_hot)[0],
    "gradient of a broadcast": jax.grad(lambda b: (jnp.zeros(n, jnp.bfloat16) + b).sum())(ones[0]),
    "segment_sum": jax.ops.segment_sum(ones, first, 1)[0],
    "segment_sum in float32": jax.ops.segment_sum(ones.astype(jnp.float32), first, 1)[0],
    ".at[].add": jnp.zeros(1, jnp.bfloat16).at[first].add(ones)[0],
    "gradient of a gather": jax.grad(lambda table: table[first].sum())(jnp.ones(1, jnp.bfloat16))[0],
}
seen["segment_sum, jit"] = jax.jit(lambda x: jax.ops.segment_sum(x, first, 1)[0])(ones)
for name, value in seen.items():
    print(f"{name}: {float(value):.0f}")
narrow = ("segment_sum", ".at[].add", "gradient of a gather", "segment_sum, jit")
assert all(float(value) == (256 if name in narrow else 1000) for name, value in seen.items()), "it changed"
print("holds: sums by index stall in bfloat16, sums along an axis do not")
PY
