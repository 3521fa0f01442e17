"""Work that a backward pass does again: equal gradients, and memory that really falls, on this platform's compiler."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.nn import layers
from dyntoken.ops import backward


def _heavy(x, w):
    logits = jnp.einsum("btc,bsc->bts", x, x)
    return jax.nn.softmax(logits, axis=-1) @ x @ w, logits.sum(axis=-1)


def _loss(layer, depth=6):
    def loss(x, weights):
        extra = 0.0
        for w in weights[:depth]:
            y, more = layer(x, w)
            x, extra = x + y, extra + more.sum()
        return (x**2).sum() + 1e-3 * extra

    return jax.grad(loss, argnums=(0, 1))


def _again(x, w):
    return backward.recomputed(_heavy, x, w)


def test_gradient_is_the_same():
    x = 0.3 * jax.random.normal(jax.random.key(0), (2, 9, 4))
    weights = [0.3 * jax.random.normal(key, (4, 4)) for key in jax.random.split(jax.random.key(1), 3)]
    with backward.plain():
        wanted = _loss(_again)(x, weights)
    chex.assert_trees_all_close(wanted, _loss(_heavy)(x, weights), rtol=1e-6)
    chex.assert_trees_all_close(jax.jit(_loss(_again))(x, weights), wanted, rtol=1e-5, atol=1e-6)


def test_arguments_that_are_absent_stay_absent():
    def fn(x, shift, w):
        return x @ w if shift is None else x @ w + shift

    x, w = jnp.ones((2, 3)), jnp.full((3, 3), 2.0)
    found = jax.grad(lambda x, w: backward.recomputed(fn, x, None, w).sum(), argnums=(0, 1))(x, w)
    np.testing.assert_array_equal(found[0], np.full((2, 3), 6.0))
    np.testing.assert_array_equal(found[1], np.full((3, 3), 2.0))


def test_memory_falls():
    shapes = (
        jax.ShapeDtypeStruct((4, 128, 16), jnp.float32),
        [jax.ShapeDtypeStruct((16, 16), jnp.float32)] * 6,
    )

    def planned(layer):
        return jax.jit(_loss(layer)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert planned(_again) < 0.6 * planned(_heavy)


def test_what_waits_is_the_same():
    x = jnp.array([[1.5, -0.0, jnp.inf]])
    np.testing.assert_array_equal(backward.after(x, jnp.array([[jnp.inf, 1.0, 2.0]])), x)


def test_gelu_keeps_one_array_and_its_derivatives():
    x = jnp.linspace(-6.0, 6.0, 101)[None]

    def chain(x):  # as autodiff has it
        return 0.5 * x * (1.0 + jax.lax.erf(x * np.sqrt(0.5)))

    np.testing.assert_array_equal(layers.gelu(x), chain(x))
    for order in (
        lambda f: jax.grad(lambda x: f(x).sum()),
        lambda f: jax.grad(lambda x: (jax.grad(lambda z: f(z).sum())(x) ** 2).sum()),
    ):
        np.testing.assert_allclose(order(layers.gelu)(x), order(chain)(x), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        jax.jvp(layers.gelu, (x,), (x,))[1], jax.jvp(chain, (x,), (x,))[1], rtol=1e-4, atol=1e-6
    )
