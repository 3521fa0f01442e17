"""Bilinear sampling of feature maps at real-valued points."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def sample(features: Array, points: Array) -> Array:
    """Features at points between the pixels.

    As in progressive sampling (yuexy/PS-ViT, its CUDA kernel): integer
    coordinates are pixel centres; beyond the border the map is 0, so values fade
    out over the first pixel outside, and at -1 and beyond they are 0.

    The gradient is the kernel's too. It equals the exact one for points inside
    [0, size - 1); a point in the rim outside gets its pixel's gradient at the
    coordinate clamped to the map, and a coordinate at or beyond the last pixel
    passes none on to the point along the other axis. Points further out get none.

    Args:
      features: `[B, H, W, C]`.
      points: `[B, P, 2]` float32, (y, x) in pixels.

    Returns:
      `[B, P, C]`, of the type of `features`.
    """
    batch, height, width, channels = features.shape
    y, x = points[..., 0], points[..., 1]
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    (top, bottom, *rows), (left, right, *columns) = _axis(y, height), _axis(x, width)
    table = features.reshape(batch, height * width, channels)

    def corner(row: Array, column: Array) -> Array:
        return jnp.take_along_axis(table, (row * width + column)[..., None], axis=1)

    # Values at (top, left), (top, right), (bottom, left), (bottom, right).
    values = [corner(row, column) for row in (top, bottom) for column in (left, right)]
    kept = inside.astype(jnp.float32)
    weights, exact = (
        [r * c * kept for r in pair for c in other]
        for pair, other in zip(rows, columns, strict=True)  # the gradient's, the value's
    )
    mixed = sum(w[..., None].astype(v.dtype) * v for w, v in zip(weights, values, strict=True))
    fixed = [jax.lax.stop_gradient(v) for v in values]
    off = sum((e - w)[..., None].astype(v.dtype) * v for e, w, v in zip(exact, weights, fixed, strict=True))
    a, b, c, d = fixed
    slope_y = _between(x, left, right, c - a, d - b)
    slope_x = _between(y, top, bottom, b - a, d - c)
    # Zeros that carry the gradient to the points.
    moved = [
        (kept * (t - jax.lax.stop_gradient(t)))[..., None] * slope.astype(jnp.float32)
        for t, slope in ((y, slope_y), (x, slope_x))
    ]
    return mixed + off + (moved[0] + moved[1]).astype(mixed.dtype)


def _axis(t: Array, size: int) -> tuple[Array, Array, tuple[Array, Array], tuple[Array, Array]]:
    """Both neighbours (clamped to the map), their weights at the clamped and at the true coordinate."""
    t = jax.lax.stop_gradient(t)
    near = jnp.clip(t, 0.0, size - 1.0)
    low = jnp.floor(near).astype(jnp.int32)
    high = jnp.minimum(low + 1, size - 1)
    share = near - low
    # A neighbour off the map counts as 0: in the rim only the border pixel is left.
    rim = 1.0 - jnp.abs(t - near)
    return low, high, (1.0 - share, share), (rim * (1.0 - share), rim * share)


def _between(t: Array, low: Array, high: Array, at_low: Array, at_high: Array) -> Array:
    """A slope interpolated (and, as the kernel does, extrapolated) between two neighbours."""
    t = jax.lax.stop_gradient(t)
    return (high - t)[..., None].astype(at_low.dtype) * at_low + (t - low)[..., None].astype(
        at_low.dtype
    ) * at_high
