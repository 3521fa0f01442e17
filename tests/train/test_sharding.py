"""Slices of a batch and pieces of a state: the step of the whole, from less memory."""

from __future__ import annotations

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from dyntoken import losses, train
from dyntoken.checkpoints import Checkpoints
from dyntoken.registry import UnknownNameError
from dyntoken.train import sharding
from dyntoken.train.build import build
from dyntoken.train.settings import read
from dyntoken.train.state import create_state
from dyntoken.train.step import gradient, train_step, update
from tests.train import test_step as whole
from tests.train.tiny import tiny_config

STEPS = 2
# (devices, slices, what is cut); with 16 rows in pairs there are at most 8 slices over all devices.
BOTH = (4, 2, "params")
CASES = [BOTH, *(pytest.param(c, marks=pytest.mark.slow) for c in ((1, 2, "none"), (1, 4, "none")))]
CASES += [pytest.param(c, marks=pytest.mark.slow) for c in ((4, 2, "none"), (4, 1, "optimizer"))]


@functools.cache
def compiled(devices, accumulate, shard):
    model, teacher, variables, _ = whole.parts()
    mesh = sharding.data_mesh(jax.devices()[:devices])
    first = {
        "model": model,
        "teacher": teacher,
        "augment": whole.augment,
        "seed": 3,
        "accumulate": accumulate,
    }
    second = {"objective": losses.Objective(whole.LOSSES), "tx": whole.optimizer(), "ema": 0.9}
    state = create_state(variables, whole.optimizer(), ema=True)
    layout = sharding.state_sharding(state, mesh, shard)
    if shard == "none":
        step = sharding.data_parallel(
            functools.partial(train_step, **first, **second), mesh, replicated=2, donate=(0,)
        )
    else:
        step = sharding.split_update(
            functools.partial(gradient, objective=second["objective"], **first),
            functools.partial(update, **second),
            mesh,
            layout,
        )
    _, teacher, batch = whole.inputs(mesh)
    state = sharding.replicate(state, mesh, layout)
    return step.lower(sharding.abstract(state, mesh, layout), teacher, batch).compile(), state, teacher, batch


@functools.cache
def trained(case):
    step, state, teacher, batch = compiled(*case)
    history = []
    for _ in range(STEPS):
        state, metrics = step(jax.tree.map(jnp.copy, state), teacher, batch)
        history.append({name: float(a) / float(n) for name, (a, n) in jax.device_get(metrics).items()})
    return state, history


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_one_result_from_slices_and_pieces(case):
    """Against one device, one slice, everything whole: all noise, both mixings, sampled masks."""
    one, losses_one = whole.trained(1, STEPS)
    state, losses = trained(case)
    for a, b in zip(losses_one, losses, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    for name in ("params", "ema", "opt_state"):
        other = jax.device_get(getattr(state, name))
        chex.assert_trees_all_close(other, getattr(one, name), atol=1e-5, rtol=0)


@pytest.mark.thorough
def test_each_device_holds_a_piece_and_updates_it():
    state, _ = trained(BOTH)
    kernel = "head", "cls", "kernel"  # [8, 7]
    for tree in (state.params, state.ema["params"], optax.tree.get(state.opt_state, "trace")):
        leaf = functools.reduce(lambda node, key: node[key], kernel, tree)
        assert leaf.sharding.spec == PartitionSpec("data")
        assert [shard.data.shape for shard in leaf.addressable_shards] == [(2, 7)] * 4
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert held < 0.3 * total  # a quarter, and what does not divide
    memory = compiled(*BOTH)[0].memory_analysis()
    assert (
        memory.argument_size_in_bytes
        < whole.compiled(4)[1].memory_analysis().argument_size_in_bytes - 0.6 * total
    )


def test_pieces_are_cut_along_the_longest_axis_that_divides():
    mesh = sharding.data_mesh(jax.devices()[:4])
    shapes = {(6, 8, 12): (None, None, "data"), (8, 8): ("data",), (7,): (), (): (), (0, 4): (None, "data")}
    for shape, spec in shapes.items():
        assert sharding.shard_longest_axis(np.zeros(shape), mesh).spec == PartitionSpec(*spec)
    assert (
        sharding.shard_longest_axis(np.zeros((8,)), sharding.data_mesh(jax.devices()[:1])).spec
        == PartitionSpec()
    )
    state = create_state(whole.parts()[2], whole.optimizer(), ema=True)
    layout = sharding.state_sharding(state, mesh, "optimizer")
    assert layout.params["head"]["cls"]["kernel"].spec == PartitionSpec()
    assert optax.tree.get(layout.opt_state, "trace")["head"]["cls"]["kernel"].spec == PartitionSpec("data")


@pytest.mark.thorough
def test_a_checkpoint_fits_every_layout_and_number_of_devices(tmp_path):
    state, _ = trained(BOTH)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(int(state.step), state)
    checkpoints.wait()
    for devices, shard in ((1, "none"), (2, "params"), (4, "optimizer")):
        mesh = sharding.data_mesh(jax.devices()[:devices])
        found = checkpoints.restore(
            sharding.abstract(state, mesh, sharding.state_sharding(state, mesh, shard))
        ).tree
        chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(state))
        leaf = optax.tree.get(found.opt_state, "trace")["head"]["cls"]["kernel"]
        assert leaf.addressable_shards[0].data.shape == ((8 if shard == "none" else 8 // devices), 7)
    checkpoints.close()


@pytest.mark.slow
def test_a_run_in_pieces_evaluates_and_goes_on_whole(tmp_path):
    cut = tiny_config(shard="params", accumulate=2, steps=1, ema=0.9, batch=16)
    first = train.run(cut, tmp_path, log=[].append)
    assert not first.state.params["head"]["cls"]["kernel"].is_fully_replicated
    assert first.metrics["count"] == first.run.info.splits["test"] == 37
    lines = []
    again = train.run(tiny_config(steps=1, ema=0.9, batch=16), tmp_path, log=lines.append)
    assert any("accumulate 2 -> 1, shard params -> none" in line for line in lines)
    assert again.state.params["head"]["cls"]["kernel"].is_fully_replicated
    for name in ("top1", "loss", "ema/loss"):
        assert again.metrics[name] == pytest.approx(first.metrics[name], rel=1e-6)


def test_whole_again():
    state, _ = trained(BOTH)
    leaf = sharding.replicate_all(state.params)["head"]["cls"]["kernel"]
    assert leaf.is_fully_replicated and leaf.addressable_shards[3].data.shape == (8, 7)
    assert sharding.replicate_all(state.step) is state.step


def test_batch_norm_refuses_slices():
    lvvit = {"model__name": "lvvit_s", "model__stem_width": 4, "model__patch_size": 8, "accumulate": 2}
    one = jax.devices()[:1]
    with pytest.raises(ValueError, match=r"accumulate=2 splits the batch .* set accumulate to 1"):
        build(tiny_config(**lvvit), devices=one)
    assert build(tiny_config(**lvvit, model__frozen_stats=True), devices=one).settings.accumulate == 2


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"config\.accumulate is 0: give a whole number of at least 1"):
        read(tiny_config(accumulate=0))
    with pytest.raises(UnknownNameError, match=r"shard is 'param': did you mean params"):
        read(tiny_config(shard="param"))
    mesh = sharding.data_mesh(jax.devices()[:4])
    with pytest.raises(
        ValueError, match=r"in groups of 4 \(mixup pairs neighbours, accumulate=2\): set batch to 16 or 32"
    ):
        sharding.check_batch(24, mesh, multiple=2, slices=2)


@pytest.mark.thorough
def test_half_precision_keeps_float32_masters():
    losses, mesh = {}, sharding.data_mesh(jax.devices()[:1])
    for dtype in ("float32", "bfloat16"):
        config = tiny_config(model__dtype=dtype, batch=4, ema=0.9, optim__name="adamw")
        run = build(config, devices=jax.devices()[:1])
        batch = {name: value[:4] for name, value in whole.make_batch().items()}
        state, metrics = run.train_step(run.new_state(), {}, sharding.place(batch, mesh))
        losses[dtype] = float(metrics["loss"][0])
        assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {np.dtype("float32")}
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_devices_are_named():
    assert sharding.describe_devices(jax.devices()[:1]) == "1 x cpu"
    assert sharding.describe_devices(jax.devices()[:4]).startswith("4 x cpu, virtual devices")
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    assert sharding.describe_devices([gpu, gpu]) == "2 x gpu (NVIDIA H200)"
