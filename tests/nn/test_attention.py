import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.nn.attention import Attention
from dyntoken.ops import attend, backend, sample

X = jax.random.normal(jax.random.key(0), (2, 5, 8))
POLICY = jnp.array([[1.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0, 1.0]])


def _both(layer, platform, params, policy=None, **options):
    """The result and the gradient of the parameters."""

    def loss(params):
        y, _ = layer.apply({"params": params}, X, policy, **options)
        return (y**2).sum(), y

    with backend.trace_for(platform):
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize("qkv_bias", [True, "qv", False])
def test_three_products_on_a_tpu_are_the_one_of_a_cpu(qkv_bias):
    layer = Attention(2, qkv_bias)
    params = layer.init(jax.random.key(1), X)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1 * (leaf.ndim == 1), params)  # biases start at zero
    (_, expected), gradients = _both(layer, "cpu", params)
    (_, found), mine = _both(layer, "tpu", params)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mine, gradients)


def test_a_training_policy_takes_the_operator_unless_someone_reads_the_probabilities(monkeypatch):
    layer = Attention(2)
    params = layer.init(jax.random.key(1), X)["params"]
    taken = []
    operator = attend.policy_attention
    monkeypatch.setattr(attend, "policy_attention", lambda *a, **k: taken.append(1) or operator(*a, **k))
    (_, expected), gradients = _both(layer, "cpu", params, POLICY, train=True, return_scores=True)
    assert not taken
    (_, found), mine = _both(layer, "cpu", params, POLICY, train=True)
    assert taken == [1]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mine, gradients)
    _both(layer, "cpu", params, POLICY, train=False)
    _both(layer, "cpu", params, POLICY, train=True, bias=jnp.zeros((2, 2, 5, 5)))
    thinned = Attention(2, attn_dropout=0.5)
    draws = sample.Draws(jax.random.key(2), jnp.arange(2))
    _both(thinned, "cpu", params, POLICY, train=True, draws=draws)
    assert taken == [1]
