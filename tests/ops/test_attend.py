import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dyntoken.ops import attend, backend, backward


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


@pytest.mark.parametrize("platform", ["cpu", "tpu", "onnx"])
@pytest.mark.parametrize("biased", [False, True])
def test_class_attention_is_a_row_of_the_weights(platform, biased):
    q, k, v = _qkv()
    batch, heads, rows, _ = q.shape
    size = jnp.arange(1.0, 1.0 + rows)[None].repeat(batch, axis=0) if biased else None
    bias = jax.random.normal(jax.random.key(5), (batch, heads, rows, rows)) if biased else None
    with backend.trace_for(platform):
        whole = attend.attention(q, k, v, scale=0.5, bias=bias, size=size)
        y, cls = attend.attention_and_class(q, k, v, 2, scale=0.5, bias=bias, size=size)
    np.testing.assert_array_equal(y, whole)
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k) * 0.5
    if biased:
        logits += bias + jnp.log(size)[:, None, None, :]
    expected = np.asarray(jax.nn.softmax(logits, axis=-1))[:, :, 0, 2:].mean(axis=1)
    np.testing.assert_allclose(cls, expected, rtol=1e-5)


def test_with_prefix():
    np.testing.assert_array_equal(attend.with_prefix(jnp.zeros((1, 2)), 2), [[1, 1, 0, 0]])


def test_unknown_platform():
    with pytest.raises(ValueError, match="choose cpu, gpu, tpu or onnx"), backend.trace_for("abacus"):
        pass


def _by_policy(seed=0, spread=1.0, dtype=jnp.float32):
    """Queries, keys, values and a policy with a softly kept and two hidden keys, and a cotangent."""
    q, k, v = _qkv(seed, rows=6) * spread
    policy = jnp.array([[1.0, 0.0, 1.0, 0.3, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]])
    weight = jax.random.normal(jax.random.key(seed + 1), q.shape)
    return (q.astype(dtype), k.astype(dtype), v.astype(dtype), policy), weight


def _definition(q, k, v, policy, eps=attend.POLICY_EPS):
    """In the precision of its inputs."""
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k) * 0.5
    keys = policy[:, None, None, :]
    p = jnp.exp(logits - logits.max(axis=-1, keepdims=True)) * (
        keys + (1 - keys) * jnp.eye(logits.shape[-1])[None, None]
    )
    p = (p + eps / logits.shape[-1]) / (p.sum(axis=-1, keepdims=True) + eps)
    return jnp.einsum("bhqk,bhkd->bhqd", p, v)


def _gradients(f, weight):
    return jax.jit(jax.value_and_grad(lambda *a: (f(*a) * weight).sum(), (0, 1, 2, 3)))


_operator = functools.partial(attend.policy_attention, scale=0.5)


@pytest.mark.parametrize(
    "spread", [1.0, 4.0]
)  # with 4 a hidden key exceeds some rows' others by far more than eps
def test_policy_attention_and_every_gradient_are_those_of_its_definition(spread):
    args, weight = _by_policy(spread=spread)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (*args, weight)]
        assert wide[0].dtype == jnp.float64
        expected, gradients = _gradients(_definition, wide[-1])(*wide[:-1])
        least = np.asarray(jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", *wide[:2]) * 0.5)).min()
    assert spread == 1.0 or least < attend.POLICY_EPS
    value, found = _gradients(_operator, weight)(*args)
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(found, gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6 * float(np.abs(theirs).max()))
    with backward.plain():
        value, found = _gradients(lambda *a: _operator(*a), weight)(*args)
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(found, gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6 * float(np.abs(theirs).max()))


def test_policy_attention_under_transformations():
    args, weight = _by_policy(2)
    _, expected = _gradients(_operator, weight)(*args)

    def check(f):
        for mine, theirs in zip(_gradients(f, weight)(*args)[1], expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)

    check(jax.checkpoint(_operator))
    check(lambda *a: jax.vmap(lambda *one: _operator(*(x[None] for x in one))[0])(*a))
    check(lambda *a: jax.lax.scan(lambda c, one: (c, _operator(*(x[None] for x in one))[0]), 0, a)[1])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    check(jax.shard_map(_operator, mesh=mesh, in_specs=spec, out_specs=spec))

    # A policy that is the same on all devices, as it is ahead of the first site.
    def own(q, k, v):
        return _operator(q, k, v, jnp.ones((len(q), 6)))

    sharded = jax.shard_map(own, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    found = _gradients(lambda q, k, v, _: sharded(q, k, v), weight)(*args)[1]
    plain = _gradients(lambda q, k, v, _: own(q, k, v), weight)(*args)[1]
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-5, atol=1e-6)


def test_policy_attention_in_bfloat16_is_as_near_as_the_plain_form():
    args, weight = _by_policy(4, dtype=jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in args]
    value, found = _gradients(_operator, weight)(*args)
    assert [g.dtype for g in found] == [jnp.bfloat16] * 3 + [jnp.float32]
    expected, gradients = _gradients(_operator, weight)(*wide)
    np.testing.assert_allclose(value, expected, rtol=0.02)
    for mine, theirs in zip(found, gradients, strict=True):
        mine = np.asarray(mine, np.float32)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=0.02 * float(np.abs(theirs).max()))


def test_forward_mode_of_policy_attention_takes_the_plain_form():
    args, _ = _by_policy(5)
    tangents = tuple(jnp.ones_like(a) for a in args)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(_operator, args, tangents)
    with backward.plain():
        value, moved = jax.jvp(_operator, args, tangents)
    np.testing.assert_allclose(value, _operator(*args), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved, jax.jvp(_definition, args, tangents)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_second_derivatives_of_policy_attention():
    (q, k, v, policy), _ = _by_policy(6)

    def hessian(f):
        return jax.hessian(lambda p: (f(q, k, v, p) ** 2).sum())(policy)

    np.testing.assert_allclose(hessian(_operator), hessian(_definition), rtol=1e-4, atol=1e-5)
