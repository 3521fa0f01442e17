"""The train step: one result on any number of devices, one gradient-sized all-reduce."""

from __future__ import annotations

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dyntoken
from dyntoken import device_augment, losses, optim
from dyntoken.train import sharding
from dyntoken.train.state import create_state, init_variables
from dyntoken.train.step import train_step
from tests.train.tiny import DENSE, DTPS, SMALL

CLASSES, ROWS, SHAPE = 7, 16, (16, 16, 3)
LOSSES = {
    "ce": {},
    "keep_ratio": {"weight": 2.0},
    "logit_kl": {"weight": 0.5},
    "token_distill": {"weight": 0.5},
}


def augment(key, images, labels, ids):
    images = device_augment.normalize(images, (0.5,) * 3, (0.25,) * 3)
    return device_augment.mix(key, images, labels, num_classes=CLASSES, mixup=0.8, cutmix=1.0)


@functools.cache
def parts():
    """Student with every kind of noise, teacher, and their variables."""
    options = {"num_classes": CLASSES, **SMALL, "depth": 2}
    model = dyntoken.create_model(DTPS, keep=0.5, at=(1,), dropout=0.1, drop_path=0.3, **options)
    teacher = dyntoken.create_model(DENSE, **options)
    variables = jax.jit(lambda: init_variables(model, SHAPE, 0))()
    # As if trained: with fresh weights the predictor's gradient is little but rounding.
    variables = jax.tree.map(lambda p: 10 * p if p.ndim > 1 else p, variables)
    return model, teacher, variables, jax.jit(lambda: init_variables(teacher, SHAPE, 1))()


def make_batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (ROWS, *SHAPE), np.uint8),
        "label": rng.integers(0, CLASSES, ROWS).astype(np.int32),
        "mask": np.ones(ROWS, np.float32),
        "id": np.arange(ROWS, dtype=np.int32),
    }


def make_step():
    model, teacher, _, _ = parts()
    return functools.partial(
        train_step,
        model=model,
        tx=optimizer(),
        objective=losses.Objective(LOSSES),
        augment=augment,
        seed=3,
        ema=0.9,
        teacher=teacher,
    )


@functools.cache
def optimizer():
    """SGD: AdamW turns a gradient that is zero but for rounding (the key bias) into a whole step."""
    options = {"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "clip": 1.0}
    return optim.make(parts()[2]["params"], total_steps=10, steps_per_epoch=5, **options)[0]


@functools.cache
def compiled(devices: int):
    """The step on the first devices, compiled once for all tests."""
    mesh = sharding.data_mesh(jax.devices()[:devices])
    state, teacher, batch = inputs(mesh)
    step = sharding.data_parallel(make_step(), mesh, replicated=2, donate=(0,))
    return mesh, step.lower(state, teacher, batch).compile()


def inputs(mesh):
    _, _, variables, teacher = parts()
    state = create_state(variables, optimizer(), ema=True)
    return (
        sharding.replicate(state, mesh),
        sharding.replicate(teacher, mesh),
        sharding.place(make_batch(), mesh),
    )


@functools.cache
def trained(devices: int, steps: int = 3):
    """(state, metrics of each step) on the host."""
    mesh, step = compiled(devices)
    state, teacher, batch = inputs(mesh)
    history = []
    for _ in range(steps):
        state, metrics = step(state, teacher, batch)
        history.append({name: float(a) / float(n) for name, (a, n) in jax.device_get(metrics).items()})
    return jax.device_get(state), history


def test_four_devices_do_what_one_does():
    (one, losses_one), (four, losses_four) = trained(1), trained(4)
    assert set(losses_one[0]) == {*LOSSES, "loss", "grad_norm", "update_norm"}
    for a, b in zip(losses_one, losses_four, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name
    chex.assert_trees_all_close(one.params, four.params, atol=1e-5, rtol=0)
    chex.assert_trees_all_close(one.ema, four.ema, atol=1e-5, rtol=0)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    for row in trained(4)[1]:
        expected = row["ce"] + 2 * row["keep_ratio"] + 0.5 * row["logit_kl"] + 0.5 * row["token_distill"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_same_gradient_on_one_and_four_devices():
    """The momentum after one step is the clipped gradient."""
    one, four = (optax.tree.get(trained(devices, steps=1)[0].opt_state, "trace") for devices in (1, 4))
    chex.assert_trees_all_close(one, four, atol=1e-5, rtol=0)
    assert all(np.abs(g).max() > 1e-5 for g in jax.tree.leaves(one))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)
    assert float(optax.tree.norm(one)) == pytest.approx(1.0, rel=1e-4)  # clipped


@pytest.mark.thorough
def test_pmap_runs_the_same_function():
    _, _, variables, teacher = parts()
    step = jax.pmap(make_step(), axis_name="data", in_axes=(None, None, 0), devices=jax.devices()[:4])
    batch = {k: v.reshape(4, ROWS // 4, *v.shape[1:]) for k, v in make_batch().items()}
    state, metrics = step(create_state(variables, optimizer(), ema=True), teacher, batch)
    mesh, shard_mapped = compiled(4)
    other, others = shard_mapped(*inputs(mesh))
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[3], state.params), jax.device_get(other.params), atol=1e-5, rtol=0
    )
    assert float(metrics["loss"][0][0]) == pytest.approx(float(others["loss"][0]), rel=1e-5)


@pytest.mark.thorough
def test_a_notebook_calls_it_on_one_device():
    """Without devices to sum over it is a function of state and batch like any other."""
    _, _, variables, teacher = parts()
    state, metrics = jax.jit(make_step())(
        create_state(variables, optimizer(), ema=True), teacher, make_batch()
    )
    other, others = trained(1, steps=1)
    chex.assert_trees_all_close(jax.device_get(state.params), other.params, atol=1e-5, rtol=0)
    loss, count = metrics["loss"]
    assert float(loss / count) == pytest.approx(others[0]["loss"], rel=1e-5)


def test_one_all_reduce_of_gradients_and_one_of_scalars():
    text = compiled(4)[1].as_text()
    pattern = r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-[a-z]+)(?:-start)?\("
    found = [(kind, shapes) for shapes, kind in re.findall(pattern, text)]
    assert [kind for kind, _ in found] == ["all-reduce", "all-reduce"], found
    sizes = sorted(sum(_elements(s) for s in re.findall(r"\w\d+\[([\d,]*)\]", shapes)) for _, shapes in found)
    parameters = sum(x.size for x in jax.tree.leaves(parts()[2]["params"]))
    assert sizes[0] == len(LOSSES)  # the counts, before the backward pass
    assert sizes[1] == parameters + len(LOSSES) + 1  # gradients, loss sums and their total


def _elements(shape: str) -> int:
    return int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))


def test_the_average_follows_the_parameters():
    mesh, step = compiled(4)
    state, teacher, batch = inputs(mesh)
    before = jax.device_get(state)
    after = jax.device_get(step(state, teacher, batch)[0])
    expected = jax.tree.map(lambda e, p: 0.1 * e + 0.9 * p, before.ema, after.variables)
    chex.assert_trees_all_close(after.ema, expected, atol=1e-7)
    assert int(after.step) == 1


def test_steps_draw_anew_and_seeds_differ():
    """The same batch three times: mixing alone makes the loss differ."""
    values = [row["ce"] for row in trained(1)[1]]
    assert len({round(v, 5) for v in values}) == 3


def test_a_fresh_average_shares_no_buffer_with_the_parameters():
    state = create_state(parts()[2], optimizer(), ema=True)
    a, b = state.params["head"]["cls"]["kernel"], state.ema["params"]["head"]["cls"]["kernel"]
    assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()


class TestMesh:
    def test_batch_must_divide(self):
        mesh = sharding.data_mesh(jax.devices()[:4])
        sharding.check_batch(8, mesh, multiple=2)
        with pytest.raises(
            ValueError, match="batch of 6 does not divide over 4 devices: set batch to 4 or 8"
        ):
            sharding.check_batch(6, mesh)
        with pytest.raises(ValueError, match=r"batch of 12 .* groups of 2 .*set batch to 8 or 16"):
            sharding.check_batch(12, mesh, multiple=2)
        with pytest.raises(ValueError, match="batch of 2 does not divide over 4 devices: set batch to 4, or"):
            sharding.check_batch(2, mesh)

    def test_a_forgotten_reduction_is_refused(self):
        mesh = sharding.data_mesh(jax.devices()[:4])
        summed = sharding.data_parallel(lambda x: jax.lax.psum(x.sum(), "data"), mesh, replicated=0)
        assert float(summed(jnp.arange(8.0))) == 28.0
        with pytest.raises(ValueError, match="replicat"):
            sharding.data_parallel(lambda x: x.sum(), mesh, replicated=0)(jnp.arange(8.0))

    def test_placed_rows_keep_their_order(self):
        mesh = sharding.data_mesh(jax.devices()[:4])
        placed = sharding.place({"x": np.arange(8)}, mesh)["x"]
        np.testing.assert_array_equal(placed, np.arange(8))
        assert [shard.data.shape for shard in placed.addressable_shards] == [(2,)] * 4
