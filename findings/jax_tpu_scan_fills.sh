#!/bin/sh
# What lax.scan's stacked results cost on a TPU before anything is written to them.
#
# Expected: nothing. Each round writes its slice, so the stack needs no first value; two scans cost twice what one costs.
# Seen with jax 0.10.2 and libtpu 0.0.52, compiled for a v5e (nothing is run, no TPU is needed): a lone scan gets
# memory that nobody fills (AllocateBuffer). With two scans whose stacks have one shape the compiler merges the zeros
# that jax hands them as first values, copies them apart again, and fills every stack: by its own estimate that
# takes as long as the three rounds that write it. What a backward pass keeps of scanned layers is such a stack, one
# per array and scan.
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
one_chip = NamedSharding(Mesh(np.array(chips[:1]), ("d",)), PartitionSpec())
ROWS, WIDTH, LAYERS = 25216, 1536, 3
STACK = f"bf16[{LAYERS},{ROWS},{WIDTH}]"


def layers(x, weights):
    return jax.lax.scan(lambda x, w: ((y := jnp.tanh(x @ w)), y), x, weights)


def compiled(scans):
    def fn(x, weights):
        stacks = []
        for w in weights:
            x, stack = layers(x, w)
            stacks.append(stack)
        return stacks

    def shape(*sides):
        return jax.ShapeDtypeStruct(sides, jnp.bfloat16, sharding=one_chip)

    return jax.jit(fn).lower(shape(ROWS, WIDTH), [shape(LAYERS, WIDTH, WIDTH)] * scans).compile().as_text()


def filled(text):
    return len(re.findall(rf"= {re.escape(STACK)}\S* broadcast\(", text))


def cycles(text):
    return sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text))


one, two = compiled(1), compiled(2)
print(f"jax {jax.__version__}: stacks filled with one scan {filled(one)}, with two {filled(two)}; "
      f"estimated cycles {cycles(one):,} and {cycles(two):,}")
assert filled(one) == 0 and '"AllocateBuffer"' in one, "a lone scan's stack is filled, too"
assert filled(two) == 2, "the stacks of two scans are filled no longer"
assert cycles(two) > 3 * cycles(one)
print("holds: stacks of one shape in two scans are filled before they are written")
PY
