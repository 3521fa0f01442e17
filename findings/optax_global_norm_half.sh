#!/usr/bin/env bash
# optax 0.2.8: the norm by which gradients are clipped is summed up in their own type, over leaves too.
#
# Expected: `global_norm` and `clip_by_global_norm` of bfloat16 or float16 gradients see the norm to that type's
# precision, as torch's `clip_grad_norm_` does (0.5 each in the last case below).
# Seen: the squares of 300 leaves of 1,000 ones (a ViT-L has about as many) add up to 262,144 instead of 300,000, and
# stay there however many leaves follow: bfloat16 has eight bits, so a leaf that is under 1/512 of the sum so far adds
# nothing. In float16 the sum overflows from a norm of 256 on: the norm is inf and clipping turns every gradient
# into 0, without a NaN that a guard would see: the run stands still.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax.numpy as jnp
import optax

print("optax", optax.__version__)
seen = {}
for leaves in (65, 300, 1000):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        name = jnp.dtype(dtype).name
        seen[leaves, name] = float(optax.global_norm([jnp.ones(1000, dtype)] * leaves))
        print(f"{leaves} leaves of 1000 ones, {name}: norm {seen[leaves, name]:.1f}, right {(1000 * leaves) ** 0.5:.1f}")
assert abs(seen[300, "float32"] - 547.72) < 0.1 and abs(seen[1000, "float32"] - 1000) < 0.1
assert seen[300, "bfloat16"] == seen[1000, "bfloat16"] == 512.0, "bfloat16 is summed otherwise now"
assert seen[300, "float16"] == float("inf"), "float16 is summed otherwise now"

clip = optax.clip_by_global_norm(1.0)
clipped, _ = clip.update({"w": jnp.full(4, 300.0, jnp.float16)}, clip.init(None))
print("four float16 gradients of 300, clipped to a norm of 1:", clipped["w"].tolist())
assert clipped["w"].tolist() == [0.0] * 4, "float16 gradients are clipped otherwise now"
print("holds: optax sums the norm in the gradients' type; bfloat16 stalls, float16 overflows and clips all to 0")
PY
