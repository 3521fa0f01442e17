"""Depthwise convolution: each channel has a filter of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dyntoken.ops import backend

Array = jax.Array
SHIFTED = "shifted_taps"  # the named scope by which `analysis` counts its products


def depthwise(x: Array, kernel: Array, *, stride: int = 1, padding: int = 0) -> Array:
    """Convolves every channel with its own filter, zeros around the grid.

    XLA's grouped convolution is slow on a CPU, most of all its gradient, so there
    the filter's taps are shifted copies that are added up (in float32).

    Args:
      x: `[B, H, W, C]`.
      kernel: `[kh, kw, 1, C]`, the layout of a grouped `nn.Conv`.
      stride, padding: of both axes; `padding` zeros on every side.

    Returns:
      `[B, h, w, C]` of x's type, h = (H + 2 padding - kh) // stride + 1.
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
    return _shifted(*_alike(padded, kernel), stride)


def _alike(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Both varying over the same mesh axes inside a `shard_map`.

    A selection that chooses nothing: autodiff sees the cast that it brings and
    sums the gradient of what is replicated over the devices.
    """
    either = x.reshape(-1)[0] == kernel.reshape(-1)[0].astype(x.dtype)
    return jnp.where(either, x, x), jnp.where(either, kernel, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted(x: Array, kernel: Array, stride: int) -> Array:
    """Convolution without padding, as a sum over taps."""
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


def _out(x: Array, kernel: Array, stride: int) -> tuple[int, int]:
    """(rows, columns) of the result."""
    return tuple(
        (side - taps) // stride + 1 for side, taps in zip(x.shape[1:3], kernel.shape[:2], strict=True)
    )


def _forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _shifted(x, kernel, stride), (x, kernel)


def _backward(stride: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    kh, kw = kernel.shape[:2]
    high, wide = _out(x, kernel, stride)
    # In x: the flipped filter over the gradient, spread out by the stride.
    rest = [
        side - taps - stride * (n - 1)
        for side, taps, n in zip(x.shape[1:3], (kh, kw), (high, wide), strict=True)
    ]
    spread = [(kh - 1, kh - 1 + rest[0], stride - 1), (kw - 1, kw - 1 + rest[1], stride - 1)]
    around = jax.lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
    of_x = _shifted(around, kernel[::-1, ::-1], 1)
    # In the filter: one tap at a time; a loop compiles once, where 49 reductions took seconds.
    span = (x.shape[0], stride * (high - 1) + 1, stride * (wide - 1) + 1, x.shape[3])
    g = g.astype(jnp.float32)

    def tap(number: Array) -> Array:
        at = jax.lax.dynamic_slice(x, (0, number // kw, number % kw, 0), span)
        return (at[:, ::stride, ::stride].astype(jnp.float32) * g).sum(axis=(0, 1, 2))

    of_kernel = jax.lax.map(tap, jnp.arange(kh * kw))
    return of_x.astype(x.dtype), of_kernel.reshape(kernel.shape).astype(kernel.dtype)


_shifted.defvjp(_forward, _backward)
