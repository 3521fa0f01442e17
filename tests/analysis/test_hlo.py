"""Programs read from their text: a small made one, and what this machine's compiler writes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from dyntoken.analysis import hlo
from dyntoken.train import sharding as meshes

# As a TPU compiler writes it, shortened: a loop of 3 rounds, fusions with an estimate, a started copy.
TPU = """\
HloModule jit_step, is_scheduled=true

%products (p0: bf16[8,16], p1: bf16[16,32]) -> bf16[8,32] {
  %p0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[8,32]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%moves (p0: f32[8,32]) -> f32[32,8] {
  %p0 = f32[8,32]{1,0} parameter(0)
  ROOT %transpose.1 = f32[32,8]{1,0} transpose(%p0), dimensions={1,0}
}

%picks (p0: f32[8,32], p1: s32[4]) -> f32[4,32] {
  %p0 = f32[8,32]{1,0} parameter(0)
  %p1 = s32[4]{0} parameter(1)
  ROOT %gather.1 = f32[4,32]{1,0} gather(%p0, %p1), offset_dims={1}
}

%body (t: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %t = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %fusion.1 = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %w), kind=kOutput, calls=%products, \
backend_config={"window_config":{"estimated_cycles":"1000","iteration_bounds":["1"]}}
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%i, %y)
}

%condition (t: (s32[], bf16[8,16])) -> pred[] {
  %n = s32[]{:T(128)} constant(3), metadata={op_name="jit(f)"}
  ROOT %lt = pred[] compare(%i, %n), direction=LT, metadata={op_name="jit(f)/while/cond/lt"}
}

ENTRY %main (a: f32[8,32], b: s32[4]) -> (f32[32,8], f32[10]) {
  %a = f32[8,32]{1,0:T(8,128)} parameter(0), metadata={op_name="batch['image']"}
  %while.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%init), condition=%condition, body=%body
  %fusion.2 = f32[32,8]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%moves, \
backend_config={"window_config":{"estimated_cycles":"200"}}
  %fusion.3 = f32[4,32]{1,0} fusion(%a, %b), kind=kLoop, calls=%picks
  %copy-start.1 = (f32[8,32]{1,0:S(1)}, f32[8,32]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done.1 = f32[8,32]{1,0:S(1)} copy-done(%copy-start.1)
  %all-reduce-start.1 = (f32[10]{0:T(256)}, bf16[6]{0}) all-reduce-start(%g, %h), to_apply=%sum
  %all-reduce-done.1 = (f32[10]{0:T(256)}, bf16[6]{0}) all-reduce-done(%all-reduce-start.1)
  %all-gather-start.1 = (f32[10]{0}, f32[40]{0}) all-gather-start(%g), dimensions={0}
  ROOT %tuple.2 = (f32[32,8]{1,0}, f32[10]{0}) tuple(%fusion.2, %g)
}
"""


def test_a_tpu_program():
    found = hlo.summary(TPU)
    assert found["collectives"] == [
        {"kind": "all-gather", "count": 1, "bytes": 40 * 4},
        {"kind": "all-reduce", "count": 1, "bytes": 10 * 4 + 6 * 2},
    ]
    assert (found["sorts"], found["gathers"], found["scatters"]) == (0, 1, 0)
    assert found["copies"] == {"count": 1, "bytes": 32 * 8 * 4}  # the started one is a prefetch
    costs = {cost["group"]: (cost["count"], cost["cycles"], cost["estimated"]) for cost in found["estimate"]}
    assert costs == {
        "matrix products and convolutions": (3, 3000, 3),
        "copies and layout": (2, 200, 1),
        "collectives": (2, 0, 0),
        "gathers and scatters": (1, 0, 0),
    }
    assert [cost["cycles"] for cost in found["estimate"]] == [3000, 200, 0, 0]
    assert found["unknown_loops"] == 0
    assert hlo.summary(TPU.replace("direction=LT", "direction=NE"))["unknown_loops"] == 1


def test_a_program_of_this_machine():
    """A loop of 5 products and a sort, the sum over 4 devices."""
    mesh = meshes.data_mesh(jax.devices()[:4])

    def fn(w, x):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)
        return jax.lax.psum(jnp.sort(x, axis=1).sum(axis=0), "data")

    specs = (PartitionSpec(), PartitionSpec("data"))
    mapped = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))
    found = hlo.summary(mapped.lower(jnp.ones((6, 6)), jnp.ones((8, 6))).compile().as_text())
    assert found["collectives"] == [{"kind": "all-reduce", "count": 1, "bytes": 6 * 4}]
    assert found["sorts"] == 1
    assert [cost["count"] for cost in found["estimate"] if cost["group"].startswith("matrix")] == [5]
    assert all(cost["cycles"] == 0 for cost in found["estimate"])


def test_text_of_something_else():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.summary("module @jit_f { func.func public @main() }")
