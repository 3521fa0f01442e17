#!/usr/bin/env bash
# jax.random.key takes a seed that its documentation calls "a 64- or 32-bit integer". Expected: a seed beyond
# 32 bits makes a key of its own, or is refused. What happens (jax 0.10.2, without jax_enable_x64): the upper half
# is dropped without a word, so that 2**32 is the key of 0, 2**32 + 1 that of 1, and -1 that of 2**32 - 1; only
# what does not fit 64 bits raises. Two runs with such "different" seeds are the same run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax


def key(seed):
    return jax.random.key_data(jax.random.key(seed)).tolist()


print("jax", jax.__version__, "x64:", jax.config.jax_enable_x64)
pairs = [(0, 2**32), (1, 2**32 + 1), (20240101, 20240101 + 5 * 2**32), (2**32 - 1, -1)]
for small, large in pairs:
    print(f"key({small}) = {key(small)}   key({large}) = {key(large)}")
    assert key(small) == key(large)
assert key(0) != key(1)
try:
    key(2**63)
except OverflowError as error:
    print(f"key(2**63): OverflowError: {error}")
else:
    raise SystemExit("key(2**63) is taken now")
print("holds: without x64 a seed counts modulo 2**32, unsaid")
PY
