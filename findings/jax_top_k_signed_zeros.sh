#!/bin/sh
# jax.lax.top_k against jax.numpy.argsort, on scores that hold signed zeros and NaN (CPU).
#
# Expected: both rank alike, since they are used for the same thing (choosing the
# tokens that stay): NaN first, equal scores by position, 0.0 equal to -0.0.
# Seen with jax 0.10.2: argsort(descending=True, stable=True) does so; top_k puts
# every 0.0 before every -0.0, and a NaN whose sign bit is set behind -inf. A
# model that selects by one and is checked against the other keeps other tokens.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)


def both(scores):
    scores = jnp.array([scores], jnp.float32)
    sort = jnp.argsort(scores, axis=-1, descending=True, stable=True)[0].tolist()
    top = jax.lax.top_k(scores, scores.shape[-1])[1][0].tolist()
    print(scores[0].tolist(), "argsort", sort, "top_k", top)
    return sort, top


zeros = both([-0.0, 0.0, -0.0, 0.0])
assert zeros == ([0, 1, 2, 3], [1, 3, 0, 2]), zeros
negative = np.copysign(np.float32(np.nan), np.float32(-1))
nan = both([1.0, negative, float("-inf"), np.nan])
assert nan == ([1, 3, 0, 2], [3, 0, 2, 1]), nan
plain = both([0.5, 0.7, 0.5, 0.1])
assert plain[0] == plain[1] == [1, 0, 2, 3], plain
print("holds: top_k tells 0.0 from -0.0 and ranks a negative NaN last, argsort does neither")
PY
