import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.ops import fuse

E = math.e
STATIC = ("same", "temperature", "measure")
squeeze = jax.jit(fuse.squeeze, static_argnames=STATIC)
mean = jax.jit(fuse.mean, static_argnames=STATIC)
one_token = jax.jit(fuse.one_token)


def _rows(key, batch, rows, width):
    return jax.random.normal(jax.random.key(key), (batch, rows, width))


def test_squeeze_literal():
    targets = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
    sources = jnp.array([[[3.0, 0.0], [0.0, 5.0], [0.0, -1.0]]])
    out = squeeze(targets, sources)
    np.testing.assert_array_equal(out.host, [[0, 1, 0]])  # the last: cosine 0 beats -1
    # target 0: e * (1,0) + e^1 (3,0) + e^0 (0,-1) over e + e + 1; target 1: (e * 2 + e * 5) / 2e
    np.testing.assert_allclose(out.x[0, 0], [4 * E / (2 * E + 1), -1 / (2 * E + 1)], rtol=1e-5)
    np.testing.assert_allclose(out.x[0, 1], [0.0, 3.5], rtol=1e-5)


def test_temperature_and_inner_product():
    targets, sources = jnp.array([[[2.0, 0.0]]]), jnp.array([[[1.0, 0.0]]])
    cold = squeeze(targets, sources, temperature=2.0)
    share = math.exp(0.5)
    np.testing.assert_allclose(cold.x[0, 0, 0], (2 * E + share) / (E + share), rtol=1e-5)
    dot = squeeze(targets, sources, temperature=4.0, measure="dot")
    np.testing.assert_allclose(dot.x[0, 0, 0], (2 * E + share) / (E + share), rtol=1e-5)


def test_measures_literal():
    a, b = jnp.array([[[3.0, 4.0]]]), jnp.array([[[0.0, 5.0], [3.0, 0.0], [3.0, 4.0]]])
    np.testing.assert_allclose(fuse.MEASURES["cosine"](a, b)[0, 0], [0.8, 0.6, 1.0], rtol=1e-5)
    np.testing.assert_allclose(fuse.MEASURES["dot"](a, b)[0, 0], [20.0, 9.0, 25.0], rtol=1e-6)
    # root mean squares of (3, -1), (0, 4), (0, 0)
    np.testing.assert_allclose(fuse.MEASURES["l2"](a, b)[0, 0], [-(5**0.5), -(8**0.5), 0.0], atol=1e-6)
    grad = jax.jit(jax.grad(lambda a: fuse.MEASURES["l2"](a, b).sum()))(a)
    assert np.isfinite(grad).all()  # at distance 0, too


def test_a_large_inner_product_stays_finite_and_finds_allowed_hosts_alone():
    x = jnp.array([[[-30.0], [20.0], [25.0], [0.5]]])
    allowed = jnp.array([[1.0, 0.0, 0.0, 0.0]])
    out = squeeze(x, x, allowed=allowed, weight=1 - allowed, same=True, measure="dot")
    np.testing.assert_array_equal(out.host[0, 1:], [0, 0, 0])  # also at -750, far below what is masked
    high = squeeze(jnp.array([[[30.0]]]), jnp.array([[[20.0]]]), measure="dot")
    np.testing.assert_allclose(high.x, [[[20.0]]], rtol=1e-6)  # e^600 would be infinite


def test_features_luck_and_masses():
    targets, sources = jnp.array([[[1.0, 0.0], [0.0, 2.0]]]), jnp.array([[[3.0, 0.0]]])
    swapped = (jnp.array([[[0.0, 1.0], [1.0, 0.0]]]), jnp.array([[[1.0, 0.0]]]))
    assert squeeze(targets, sources, compared=swapped).host[0, 0] == 1
    assert mean(targets, sources, compared=swapped).host[0, 0] == 1
    drawn = squeeze(targets, sources, measure="random", luck=jnp.array([[[0.1, 0.9]]]))
    assert drawn.host[0, 0] == 1
    np.testing.assert_allclose(drawn.x[0, 1], [3 / (E + 1), 2 * E / (E + 1)], rtol=1e-5)  # cosine 0
    weighed = squeeze(targets, sources, mass=(jnp.array([[3.0, 1.0]]), jnp.array([[2.0]])))
    np.testing.assert_allclose(weighed.x[0, 0], [(3 * 1 + 2 * 3) / 5, 0.0], rtol=1e-6)


@functools.partial(jax.jit, static_argnums=1)
def _both_forms(x, kept):
    keep = (jnp.arange(x.shape[1]) < kept).astype(jnp.float32)[None]
    short = fuse.squeeze(x[:, :kept], x[:, kept:])
    return short, fuse.squeeze(x, x, allowed=keep, weight=1 - keep, same=True)


@hypothesis.given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_both_forms_of_squeeze_agree(kept, dropped, key):
    x = np.random.default_rng(key).normal(size=(1, kept + dropped, 4)).astype(np.float32)
    short, long = jax.device_get(_both_forms(x, kept))
    np.testing.assert_allclose(long.x[:, :kept], short.x, atol=1e-5)
    np.testing.assert_allclose(long.x[:, kept:], x[:, kept:], atol=1e-6)  # dropped rows keep their value
    np.testing.assert_array_equal(long.host[:, kept:], short.host)


@hypothesis.given(st.permutations(range(5)))
def test_squeeze_does_not_depend_on_the_order_of_the_dropped(order):
    targets, sources = _rows(0, 1, 3, 4), _rows(1, 1, 5, 4)
    shuffled = sources[:, jnp.array(order)]
    np.testing.assert_allclose(squeeze(targets, shuffled).x, squeeze(targets, sources).x, atol=1e-6)


def test_equal_similarity_takes_the_first_host():
    targets = jnp.ones((1, 2, 3))
    out = squeeze(targets, 2 * jnp.ones((1, 1, 3)))
    np.testing.assert_array_equal(out.host, [[0]])
    np.testing.assert_allclose(out.x[0, 1], 1.0, rtol=1e-6)


def _by_mass(x, y, **roles):
    return squeeze(x, y, mass=(jnp.ones(x.shape[:2]), jnp.ones(y.shape[:2])), **roles)


@pytest.mark.parametrize("rule", [squeeze, mean, _by_mass], ids=["squeeze", "mean", "mass"])
def test_without_a_host_nothing_changes(rule):
    x = _rows(2, 2, 4, 3)
    nobody = jnp.zeros((2, 4))
    out = rule(x, x, allowed=nobody, weight=1 - nobody, same=True)
    np.testing.assert_allclose(out.x, x, atol=1e-6)
    grad = jax.jit(jax.grad(lambda x: rule(x, x, allowed=nobody, weight=1 - nobody, same=True).x.sum()))(x)
    assert np.isfinite(grad).all()


def test_zero_rows_have_finite_gradients():
    grad = jax.jit(jax.grad(lambda x: squeeze(x, x[:, :1]).x.sum()))(jnp.zeros((1, 2, 3)))
    assert np.isfinite(grad).all()


def test_decision_gradient_literal():
    # y = (e x0 + d e^{d s} x1) / (e + d e^{d s}); at d = 0: dy/dd = (x1 - x0) / e.
    x = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    allowed = jnp.array([[1.0, 0.0]])

    def y(d):
        return squeeze(x, x, allowed=allowed, weight=jnp.array([[0.0, 1.0]]) * d, same=True).x[0, 0]

    np.testing.assert_allclose(jax.jit(jax.jacobian(y))(0.0), [-1 / E, 1 / E], rtol=1e-5)


def test_mean_literal():
    targets, sources = jnp.array([[[1.0, 0.0], [0.0, 2.0]]]), jnp.array([[[3.0, 0.1], [5.0, 0.0]]])
    out = mean(targets, sources)
    np.testing.assert_allclose(out.x, [[[3.0, 0.1 / 3], [0.0, 2.0]]], rtol=1e-5)


def test_one_token_is_the_weighted_sum_not_the_mean():
    sources = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
    out = one_token(sources, sources, importance=jnp.array([[0.1, 0.2]]))
    np.testing.assert_allclose(out.extra, [[[0.7, 1.0]]], rtol=1e-6)
    masked = one_token(sources, sources, importance=jnp.array([[0.1, 0.2]]), weight=jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(masked.extra, [[[0.1, 0.2]]], rtol=1e-6)


def test_drop_changes_nothing():
    x = _rows(5, 1, 3, 2)
    out = fuse.drop(x, x)
    assert out.extra is None and out.host is None
    np.testing.assert_array_equal(out.x, x)
