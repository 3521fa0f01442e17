#!/bin/sh
# What jax.checkpoint saves of a training step's memory on a CPU.
#
# Expected: a stack of layers under jax.checkpoint needs the memory of one layer and of the layers' inputs, as its
# documentation says; its barriers keep the compiler from merging the second computation with the first.
# Seen with jax 0.10.2: outside of a loop nothing is saved, to the byte. XLA's CPU compiler removes optimization_barrier
# before it merges equal work and orders the rest, finds the recomputation equal to the forward pass, and keeps that.
# Inside lax.scan, whose two loops nothing merges, it saves what it promises. Neither warns.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp

LAYERS, ROWS, WIDTH = 8, 2048, 512


def attention(x, w):
    return x + jax.nn.softmax(x @ x.T * 0.01, axis=-1) @ x @ w


def compiled(layer, loop):
    def loss(weights, x):
        if loop:
            return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0].sum()
        for w in weights:
            x = layer(x, w)
        return x.sum()

    shapes = (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH)
    return jax.jit(jax.grad(loss)).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


def megabytes(program):
    return program.memory_analysis().temp_size_in_bytes / 2**20


checkpointed = jax.checkpoint(attention)
plain, kept = megabytes(compiled(attention, False)), megabytes(compiled(checkpointed, False))
looped, saved = megabytes(compiled(attention, True)), megabytes(compiled(checkpointed, True))
print(f"jax {jax.__version__}, MiB between arguments and results, {LAYERS} layers: {plain:.0f}, with jax.checkpoint "
      f"{kept:.0f}; in lax.scan {looped:.0f}, with jax.checkpoint {saved:.0f}")
assert "opt-barrier" not in compiled(checkpointed, False).as_text()
assert kept == plain, "jax.checkpoint saves memory on a CPU outside of a loop now"
assert saved < 0.5 * looped, "in a loop jax.checkpoint no longer saves"
print("holds: on a CPU jax.checkpoint saves nothing outside of a loop, and what it promises inside")
PY
