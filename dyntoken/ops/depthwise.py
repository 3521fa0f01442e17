"""Depthwise convolution: each channel has a filter of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dyntoken.ops import backend, backward

Array = jax.Array
SHIFTED = "shifted_taps"  # the named scope by which `analysis` counts its products


def depthwise(x: Array, kernel: Array, *, stride: int = 1, padding: int = 0) -> Array:
    """Convolves every channel with its own filter, zeros around the grid.

    XLA's grouped convolution is slow on a CPU, most of all its gradient, so there
    the filter's taps are shifted copies that are added up (in float32).

    Args:
      x: `[B, H, W, C]`, the result `[B, h, w, C]` with h = (H + 2 padding - kh) // stride + 1.
      kernel: `[kh, kw, 1, C]`, the layout of a grouped `nn.Conv`.
      stride, padding: of both axes; `padding` zeros on every side.
    """
    if kernel.ndim != 4 or kernel.shape[2:] != (1, x.shape[-1]):
        raise ValueError(f"kernel {kernel.shape} must be [kh, kw, 1, {x.shape[-1]}] for x {x.shape}")
    if any(side + 2 * padding < taps for side, taps in zip(x.shape[1:3], kernel.shape[:2], strict=True)):
        raise ValueError(f"a grid of {x.shape[1:3]} is too small for a {kernel.shape[:2]} filter")
    if backend.platform() != "cpu":
        return jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            (stride, stride),
            ((padding, padding), (padding, padding)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    if backward.is_plain():
        return _sum_of_taps(padded, kernel, stride)
    (kernel,) = backward.varying_as(padded, kernel)
    return _shifted(*backward.varying_as(kernel, padded), kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted(x: Array, kernel: Array, stride: int) -> Array:
    """Convolution without padding, as a sum over taps."""
    return _sum_of_taps(x, kernel, stride)


def _out(x: Array, kernel: Array, stride: int) -> tuple[int, int]:
    """(rows, columns) of the result."""
    return tuple(
        (side - taps) // stride + 1 for side, taps in zip(x.shape[1:3], kernel.shape[:2], strict=True)
    )


# Compiled as functions of their own, so that blocks of one shape are traced once.
@functools.partial(jax.jit, static_argnums=2)
def _sum_of_taps(x: Array, kernel: Array, stride: int) -> Array:
    kh, kw = kernel.shape[:2]
    high, wide = _out(x, kernel, stride)
    wide_x, taps = x.astype(jnp.float32), kernel.astype(jnp.float32)
    y = jnp.zeros((), jnp.float32)
    with jax.named_scope(SHIFTED):
        for i in range(kh):
            rows = wide_x[:, i : i + stride * (high - 1) + 1 : stride]
            for j in range(kw):
                at = rows[:, :, j : j + stride * (wide - 1) + 1 : stride]
                y = y + at * taps[i, j][None, None]
    return y.astype(x.dtype)


def _forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _shifted(x, kernel, stride), (x, kernel)


def _backward(stride: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    return _of_x(x, kernel, g, stride), _of_kernel(x, kernel, g, stride)


def _of_x(x: Array, kernel: Array, g: Array, stride: int) -> Array:
    """Gradient in x: the flipped filter over `g`, spread out by the stride."""
    sizes = zip(x.shape[1:3], kernel.shape[:2], _out(x, kernel, stride), strict=True)
    around = [(taps - 1, side - 1 - stride * (n - 1), stride - 1) for side, taps, n in sizes]
    padded = jax.lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *around, (0, 0, 0)])
    return _sum_of_taps(padded, kernel[::-1, ::-1], 1).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=3)
def _of_kernel(x: Array, kernel: Array, g: Array, stride: int) -> Array:
    """Gradient in the filter, tap by tap in a loop: 49 reductions in a row took seconds to compile."""
    kh, kw = kernel.shape[:2]
    high, wide = _out(x, kernel, stride)
    span = (x.shape[0], stride * (high - 1) + 1, stride * (wide - 1) + 1, x.shape[3])
    g = g.astype(jnp.float32)

    def tap(number: Array) -> Array:
        at = jax.lax.dynamic_slice(x, (0, number // kw, number % kw, 0), span)
        return (at[:, ::stride, ::stride].astype(jnp.float32) * g).sum(axis=(0, 1, 2))

    taps = jax.lax.map(tap, jnp.arange(kh * kw))
    return taps.reshape(kernel.shape).astype(kernel.dtype)


_shifted.defvjp(_forward, _backward)
