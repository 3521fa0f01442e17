import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dyntoken.ops import attend, backend


def _qkv(key=0, batch=2, heads=2, rows=5, dim=4):
    return jax.random.normal(jax.random.key(key), (3, batch, heads, rows, dim))


def test_policy_softmax_literal():
    # One query row over two keys, logits 0 and ln 3, second key masked; the row is its own key 0.
    logits = jnp.log(jnp.array([[[[1.0, 3.0], [1.0, 3.0]]]]))
    p = attend.policy_softmax(logits, jnp.array([[1.0, 0.0]]))
    # max over all keys: weights exp(l - max) = 1/3, 1; row 0 sees key 0 only, row 1 also itself.
    eps = 1e-6
    row0 = np.array([1 / 3 + eps / 2, eps / 2]) / (1 / 3 + eps)
    row1 = np.array([1 / 3 + eps / 2, 1 + eps / 2]) / (4 / 3 + eps)
    np.testing.assert_allclose(p[0, 0], [row0, row1], rtol=1e-6)


def test_policy_of_ones_is_softmax_up_to_eps():
    logits = jax.random.normal(jax.random.key(1), (2, 3, 6, 6)) * 3
    p = attend.policy_softmax(logits, jnp.ones((2, 6)))
    np.testing.assert_allclose(p, jax.nn.softmax(logits, axis=-1), atol=1e-6)


def test_masked_softmax_equals_softmax_of_the_rest():
    logits = jax.random.normal(jax.random.key(2), (1, 2, 4, 4))
    p = attend.masked_softmax(logits, jnp.array([[1.0, 0.0, 1.0, 0.0]]))
    np.testing.assert_allclose(p[..., [0, 2]], jax.nn.softmax(logits[..., [0, 2]], axis=-1), rtol=1e-6)
    assert float(p[..., [1, 3]].max()) == 0.0


def test_masked_softmax_of_nothing_is_finite():
    p = attend.masked_softmax(jnp.ones((1, 1, 2, 3)), jnp.zeros((1, 3)))
    np.testing.assert_allclose(p, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_attention_equals_its_definition(platform):
    q, k, v = _qkv()
    expected = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", q, k) * 0.5, axis=-1) @ v
    with backend.trace_for(platform):
        np.testing.assert_allclose(attend.attention(q, k, v, scale=0.5), expected, atol=1e-6)


def test_attention_gradients():
    q, k, v = _qkv(3, 1, 1, 3, 2)
    check_grads(
        lambda *a: attend.attention(*a, scale=0.7), (q, k, v), order=1, modes=["rev"], atol=1e-2, rtol=1e-2
    )


def test_policy_gradient_reaches_the_decision():
    logits = jax.random.normal(jax.random.key(4), (1, 1, 3, 3))
    grad = jax.grad(lambda p: attend.policy_softmax(logits, p)[0, 0, 0, 2])(jnp.array([[1.0, 1.0, 0.0]]))
    assert float(grad[0, 2]) > 0.05  # more policy, more attention to that key


def test_class_attention_drops_prefix_columns():
    probs = jnp.arange(18.0).reshape(1, 2, 3, 3)
    np.testing.assert_allclose(attend.class_attention(probs, 1), [[5.5, 6.5]])
    np.testing.assert_allclose(attend.class_attention(probs, 2), [[6.5]])


def test_with_prefix():
    np.testing.assert_array_equal(attend.with_prefix(jnp.zeros((1, 2)), 2), [[1, 1, 0, 0]])


def test_unknown_platform():
    with pytest.raises(ValueError, match="choose cpu, gpu, tpu or onnx"), backend.trace_for("abacus"):
        pass
