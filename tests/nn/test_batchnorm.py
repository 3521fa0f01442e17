"""BatchNorm: torch's running statistics, and the same result on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dyntoken.nn.batchnorm import BatchNorm

ROWS = jnp.asarray(np.random.default_rng(0).normal(3.0, 2.0, (8, 2, 3)), jnp.float32)
FRESH = {
    "params": {"scale": jnp.asarray([1.0, 2.0, 0.5]), "bias": jnp.asarray([0.0, 1.0, -1.0])},
    "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)},
}


def test_training_normalises_by_the_batch_and_keeps_torchs_running_statistics():
    x = jnp.asarray([[1.0, 5.0], [3.0, 5.0]])  # means 2 and 5, variances 1 and 0, unbiased 2 and 0
    model = BatchNorm(eps=0.0625)
    variables = model.init(jax.random.key(0), x, True)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], [1, 1])  # building is no training
    y, stats = model.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, np.array([[-1, 0], [1, 0]]) / np.sqrt(1.0625), rtol=1e-6)
    np.testing.assert_allclose(stats["batch_stats"]["mean"], [0.2, 0.5], rtol=1e-6)
    np.testing.assert_allclose(stats["batch_stats"]["var"], [0.9 + 0.2, 0.9], rtol=1e-6)


def test_evaluation_and_frozen_training_use_the_running_statistics():
    variables = {**FRESH, "batch_stats": {"mean": jnp.full(3, 3.0), "var": jnp.full(3, 4.0)}}
    expected = (np.asarray(ROWS) - 3.0) / np.sqrt(4.0 + 1e-5) * np.array([1, 2, 0.5]) + np.array([0, 1, -1])
    np.testing.assert_allclose(BatchNorm().apply(variables, ROWS, False), expected, rtol=1e-5, atol=1e-6)
    y, stats = BatchNorm(frozen=True).apply(variables, ROWS, True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(stats["batch_stats"]["mean"], 3.0)


def _step(params, x, target):
    """This device's share of a loss and its gradient, and the new statistics."""

    def loss(params):
        y, stats = BatchNorm().apply({**FRESH, "params": params}, x, True, mutable=["batch_stats"])
        return jnp.sum(jnp.square(jnp.tanh(y) - target)), stats["batch_stats"]

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, stats, grads


def _sharded(params, x, target):
    params = jax.lax.pcast(params, "data", to="varying")
    value, stats, grads = _step(params, x, target)
    return *jax.lax.psum((value, grads), "data"), stats


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_four_devices_do_what_one_does(how):
    target = jnp.tanh(ROWS[::-1])
    params = FRESH["params"]
    value, stats, grads = jax.jit(_step)(params, ROWS, target)
    if how == "shard_map":
        mesh, split = Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data")
        spec = (PartitionSpec(), split, split)
        run = jax.jit(jax.shard_map(_sharded, mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))
        found = run(params, ROWS, target)
    else:
        run = jax.pmap(_sharded, axis_name="data", in_axes=(None, 0, 0), devices=jax.devices()[:4])
        found = jax.tree.map(
            lambda a: a[1], run(params, ROWS.reshape(4, 2, 2, 3), target.reshape(4, 2, 2, 3))
        )
    for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves((value, grads, stats)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-5)
    assert float(jnp.abs(grads["scale"]).min()) > 1e-2


def test_half_precision_keeps_statistics_in_float32():
    y, stats = BatchNorm(dtype=jnp.bfloat16).apply(
        FRESH, ROWS.astype(jnp.bfloat16) + 300, True, mutable=["batch_stats"]
    )
    assert y.dtype == jnp.bfloat16 and stats["batch_stats"]["var"].dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32).mean(axis=(0, 1)), [0, 1, -1], atol=0.02)
