#!/usr/bin/env bash
# jax 0.10.2: what jax.random draws in bfloat16 takes 128 values, and is not of the distribution it is named after.
#
# Expected: draws rounded to bfloat16, as torch's are (randn: thousands of values, up to 5 in a million).
# Seen: draws start from a uniform one of 7 bits. A million normal draws take 128 values between -2.9 and 2.5, with a
# mean of -0.012 (float32's: 0.0002); Gumbel noise ends at 4.84, so that `categorical` of bfloat16 logits draws an event
# of probability 0.001 0.6 times as often as it should. float16: 1,024 values. `gumbel(mode="high")` helps that one only.
# Who initialises parameters in bfloat16, or draws a policy from half-precision logits, has this. Remedy: draw in
# float32, then round.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)
key, n = jax.random.key(0), 10**6
rounded = jax.random.normal(key, (n,)).astype(jnp.bfloat16)
values, means, rare = {}, {}, {}
for name in ("float32", "float16", "bfloat16"):
    draws = np.asarray(jax.random.normal(key, (n,), name).astype(jnp.float32))
    values[name], means[name] = len(np.unique(draws)), float(draws.mean(dtype=np.float64))
    logits = jnp.log(jnp.array([0.001, 0.999])).astype(name)
    rare[name] = float((jax.random.categorical(key, logits, shape=(n,)) == 0).mean())
    gumbel = float(jax.random.gumbel(key, (n,), name).max())
    print(
        f"{name}: normal has {values[name]} values in [{draws.min():.2f}, {draws.max():.2f}], mean {means[name]:.5f}; "
        f"largest Gumbel {gumbel:.2f}; an event of P = 0.001 drawn at {rare[name]:.5f}"
    )
distinct = len(np.unique(np.asarray(rounded.astype(jnp.float32))))
print(f"drawn in float32 and rounded to bfloat16: {distinct} values")
assert values["bfloat16"] == 128 and values["float16"] == 1024 and distinct > 2000, "draws have other values now"
assert means["bfloat16"] < -0.008 and abs(means["float32"]) < 0.003, "the mean is another now"
assert rare["bfloat16"] < 0.0008 and abs(rare["float32"] - 0.001) < 0.0002, "categorical draws otherwise now"
print("holds: jax.random in bfloat16 draws 128 values, off centre and without tails")
PY
