"""Layer normalisation: flax's values, its definition's gradient, in both precisions."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.nn import layers
from dyntoken.ops import backend, backward, norm

SHAPES = [(3, 7, 16), (5, 16), (2, 3, 4, 16)]


def _args(shape, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(len(shape)), 3)
    x = (2.0 * jax.random.normal(keys[0], shape) + 0.7).astype(dtype)
    return x, 1.0 + jax.random.normal(keys[1], shape[-1:]), jax.random.normal(keys[2], shape[-1:])


def _norm(x, scale, bias):
    return norm.layer_norm(x, scale, bias, eps=1e-6, dtype=x.dtype)


def _gradients(fn, args):
    return jax.grad(lambda *a: jnp.sin(fn(*a).astype(jnp.float32)).sum(), argnums=(0, 1, 2))(*args)


def test_two_numbers_by_hand():
    y = norm.layer_norm(
        jnp.array([[1.0, 3.0]]), jnp.array([2.0, 2.0]), jnp.array([0.0, 5.0]), eps=0.0, dtype="float32"
    )
    np.testing.assert_array_equal(y, [[-2.0, 7.0]])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_are_those_of_flax_bit_for_bit(shape, dtype):
    x, scale, bias = _args(shape, dtype)
    variables = {"params": {"scale": scale, "bias": bias}}
    wanted = nn.LayerNorm(epsilon=1e-6, dtype=dtype).apply(variables, x)
    np.testing.assert_array_equal(layers.LayerNorm(epsilon=1e-6, dtype=dtype).apply(variables, x), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gradient_is_that_of_the_definition(shape, platform):
    args = _args(shape)
    with backward.plain():
        wanted = _gradients(_norm, args)
    with backend.trace_for(platform):
        found = _gradients(_norm, args)
    chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_half_precision_differs_by_its_rounding():
    args = _args((3, 7, 16), jnp.bfloat16)
    wide = _args((3, 7, 16))[1:]
    found = _gradients(_norm, args)
    assert [g.dtype for g in found] == [jnp.bfloat16, jnp.float32, jnp.float32]
    wanted = _gradients(_norm, (args[0].astype(jnp.float32), *wide))
    for got, want in zip(found, wanted, strict=True):
        assert np.linalg.norm(got.astype(jnp.float32) - want) < 0.02 * np.linalg.norm(want)


def test_a_row_without_spread_has_finite_gradients():
    _, scale, bias = _args((1, 16))
    found = _gradients(_norm, (jnp.full((1, 16), 3.0), scale, bias))
    assert all(np.isfinite(g).all() for g in found)


def test_pure_forward_mode_through_a_model_where_it_is_asked_for():
    model = dyntoken.create_model("deit_tiny_patch4_8", width=8, heads=2, depth=1)
    images = jnp.linspace(-1, 1, 8 * 8 * 3).reshape(1, 8, 8, 3)
    variables = model.init(jax.random.key(0), images)

    def logits(x):
        return model.apply(variables, x).logits

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(logits, (images,), (images,))
    with backward.plain():
        moved = jax.jvp(lambda x: logits(x), (images,), (images,))[1]
    step = 1e-2
    slope = (logits(images * (1 + step)) - logits(images * (1 - step))) / (2 * step)
    np.testing.assert_allclose(moved, slope, rtol=0.05, atol=1e-3)
