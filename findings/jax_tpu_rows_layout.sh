#!/bin/sh
# How a TPU's compiler lays out the rows of a transformer behind a batched product that selects them.
#
# Expected: as it lays out the rows ahead of it. The blocks are the same, only shorter, and so are their products.
# Seen with jax 0.10.2 and libtpu 0.0.52, compiled for a v5e (nothing is run, no TPU is needed): blocks on their own,
# as after a convolution, get rows outermost, so that a LayerNorm's sums and its product with the next kernel belong to one
# fusion each. Behind a one-hot product over the batch (which takes rows without a gather) the batch stays outermost in what
# blocks hand on, every norm is written out between two layouts, and by the compiler's own estimate the same blocks take a
# third more cycles. One jax.experimental.layout.with_layout_constraint on the selected rows takes most of that back.
# jax.export refuses a program with such a constraint: its custom call is none that jax promises to keep.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.52 numpy==2.3.5
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 "$folder/venv/bin/python" - 2>"$folder/log" <<'PY'
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
one_chip = NamedSharding(Mesh(np.array(chips[:1]), ("d",)), PartitionSpec())
BATCH, ROWS, KEPT, WIDTH, HEADS, BLOCKS = 128, 197, 97, 384, 6, 3


def norm(x):
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    return ((x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-6)).astype(jnp.bfloat16)


def blocks(x, weights):
    for q, k, v, out, up, down in weights:
        y = norm(x)
        y = jax.nn.dot_product_attention(*((y @ w).reshape(*y.shape[:2], HEADS, -1) for w in (q, k, v)))
        x = x + y.reshape(x.shape) @ out
        x = x + jax.nn.gelu(norm(x) @ up) @ down
    return x


def select(x, rows):
    return jnp.einsum("bkn,bnc->bkc", jax.nn.one_hot(rows, x.shape[1], dtype=x.dtype), x)


def model(constrained):
    def fn(x, rows, ahead, behind):
        x = select(blocks(x, ahead), rows)
        if constrained:
            x = with_layout_constraint(x, Layout(major_to_minor=(1, 0, 2)))
        with jax.named_scope("behind"):
            return blocks(x, behind)

    return fn


def shape(*sides, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sides, dtype, sharding=one_chip)


square, wide, narrow = shape(WIDTH, WIDTH), shape(WIDTH, 4 * WIDTH), shape(4 * WIDTH, WIDTH)
weights = [(square,) * 4 + (wide, narrow)] * BLOCKS
shapes = (shape(BATCH, ROWS, WIDTH), shape(BATCH, KEPT, dtype=jnp.int32), weights, weights)


def behind(constrained):
    text = jax.jit(model(constrained)).lower(*shapes).compile().as_text()
    lines = [line for line in text.splitlines() if "/behind/" in line]
    return sum(int(n) for line in lines for n in re.findall(r'"estimated_cycles":"(\d+)"', line))


free, fixed = behind(False), behind(True)
print(f"jax {jax.__version__}: estimated cycles of the blocks behind {free:,}, with rows outermost {fixed:,}")
assert fixed < 0.85 * free, "the blocks behind a selection are laid out as those ahead of it"
small = (jnp.zeros((2, 3, WIDTH)), jnp.zeros((2, 2), jnp.int32), [], [])
try:
    jax.export.export(jax.jit(model(True)))(*small)
except ValueError as error:
    assert "LayoutConstraint" in str(error)
else:
    raise AssertionError("jax.export writes a layout constraint")
print("holds: rows behind a batched product are laid out with the batch outermost; a constraint is not exported")
PY
