"""Layer normalisation with a backward pass that keeps its input alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dyntoken.ops import backend, backward

Array = jax.Array


def layer_norm(x: Array, scale: Array, bias: Array, *, eps: float, dtype: jnp.dtype) -> Array:
    """Each row less its mean, over its standard deviation, times `scale`, plus `bias`.

    In float32, the variance as the mean square less the squared mean: bit for bit what `flax.linen.LayerNorm` computes.

    Args:
      x: `[..., C]`.
      scale, bias: `[C]`.
      dtype: of the result.
    """
    if backward.is_plain():
        return _forward(x, scale, bias, eps, jnp.dtype(dtype))[0]
    return _layer_norm(x, *backward.varying_as(x, scale, bias), eps, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x: Array, scale: Array, bias: Array, eps: float, dtype: jnp.dtype) -> Array:
    return _forward(x, scale, bias, eps, dtype)[0]


def _forward(
    x: Array, scale: Array, bias: Array, eps: float, dtype: jnp.dtype
) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(jnp.float32)
    mean, square = wide.mean(axis=-1, keepdims=True), jnp.square(wide).mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.maximum(0.0, square - jnp.square(mean)) + eps)
    y = (wide - mean) * (inverse * _row(scale, x)) + _row(bias, x)
    return y.astype(dtype), (x, scale, mean, inverse)


def _backward(eps: float, dtype: jnp.dtype, kept: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    x, scale, mean, inverse = kept
    dy = dy.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse
    product = dy * normed
    of_mean, of_deviation = _weighed(dy, scale), _weighed(product, scale)
    dx = inverse * (dy * _row(scale, x) - of_mean - normed * of_deviation)
    rows = tuple(range(x.ndim - 1))
    return (
        dx.astype(x.dtype),
        product.sum(axis=rows).astype(scale.dtype),
        dy.sum(axis=rows).astype(scale.dtype),
    )


_layer_norm.defvjp(_forward, _backward)


def _weighed(rows: Array, scale: Array) -> Array:
    """The mean of `rows [..., C]` times `scale`, `[..., 1]`.

    On a CPU as a product: for sums XLA (jax 0.10.2) wrote the scale out for each row, and a stack of norms and
    products trained at a third of the speed.
    """
    if backend.platform() == "cpu":
        return (rows @ scale.astype(jnp.float32))[..., None] / rows.shape[-1]
    return (rows * _row(scale, rows)).mean(axis=-1, keepdims=True)


def _row(vector: Array, like: Array) -> Array:
    """`vector [C]` with as many axes as `like`."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
