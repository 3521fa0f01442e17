import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.ops import backend
from dyntoken.reducers.predictor import HeadPredictor, Predictor


@pytest.mark.parametrize(
    ("network", "masked"),
    [(Predictor(), False), (Predictor(head="local"), True), (HeadPredictor(heads=2), True)],
)
def test_a_tpu_computes_the_same_in_parts(network, masked):
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    alive = jnp.array([[1.0, 0.0, 1.0, 1.0, 0.0], [0.0] * 5]) if masked else None
    variables = jax.tree.map(lambda leaf: leaf + 0.1, network.init(jax.random.key(1), x))

    def loss(variables, x):
        y = network.apply(variables, x, alive)
        return sum(leaf.sum(axis=1).std() for leaf in jax.tree.leaves(y)), y

    results = {}
    for platform in ("cpu", "tpu"):
        with backend.trace_for(platform):
            results[platform] = jax.jit(jax.value_and_grad(lambda *args: loss(*args), (0, 1), has_aux=True))(
                variables, x
            )
    assert jax.tree.structure(results["cpu"]) == jax.tree.structure(results["tpu"])
    for ours, whole in zip(*map(jax.tree.leaves, (results["tpu"], results["cpu"])), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-6)


def test_the_global_half_is_the_mean_of_the_rows_alive():
    network = Predictor()
    x = jax.random.normal(jax.random.key(0), (1, 4, 8))
    variables = network.init(jax.random.key(1), x)
    two = network.apply(variables, x[:, :2])
    masked = network.apply(variables, x, jnp.array([[1.0, 1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(masked[:, :2], two, rtol=1e-5)
    none = network.apply(variables, x, jnp.zeros((1, 4)))
    assert bool(jnp.isfinite(none).all())
