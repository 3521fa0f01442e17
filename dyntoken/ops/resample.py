"""Resizing of position embeddings and of what a cascade reuses, as torch does it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
METHODS = ("bicubic", "bilinear", "timm", "dinov2")


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' kernel with torch's coefficient (`jax.image.resize` uses -0.5)."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(distance))


def resize_matrix(old: int, new: int, method: str) -> np.ndarray:
    """Weights `[new, old]` of a one-dimensional resize.

    torch's `interpolate(align_corners=False)`: half-pixel centres. "bicubic" and
    "bilinear" repeat border values and do not widen their kernel when shrinking;
    "timm" is bicubic with `antialias=True`: a widening kernel, another coefficient
    (also when enlarging), weights renormalised at the borders; "dinov2" is bicubic by
    the factor (new + 0.1) / old, as facebookresearch/dinov2 calls it without registers.
    """
    if method not in METHODS:
        raise ValueError(f"unknown resize method {method!r}: choose {', '.join(METHODS)}")
    centre = (np.arange(new) + 0.5) * old / (new + 0.1 * (method == "dinov2")) - 0.5
    if method == "timm":
        distance = (np.arange(old) - centre[:, None]) / max(old / new, 1.0)
        weights = _cubic(distance, a=-0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    if method == "bilinear":
        centre = np.maximum(centre, 0.0)
    first = np.floor(centre).astype(int)
    kernel, taps = (_linear, range(2)) if method == "bilinear" else (_cubic, range(-1, 3))
    weights = np.zeros((new, old))
    for tap in taps:
        column = np.clip(first + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), column), kernel(centre - (first + tap)))
    return weights


def resize_grid(x: Array, old: tuple[int, int], new: tuple[int, int], method: str = "bicubic") -> Array:
    """Resizes rows on a grid: `[B, h * w, C]` from grid `old` to grid `new`.

    Args:
      method: "bicubic" (EViT, TPS, DeiT: a = -0.75), "bilinear" (DynamicViT), "timm" (antialiased) or "dinov2".
    """
    if x.shape[1] != old[0] * old[1]:
        raise ValueError(f"{x.shape[1]} rows do not fill a grid of {tuple(old)}")
    if tuple(old) == tuple(new):
        return x
    with jax.named_scope("resize"):
        rows, columns = (
            jnp.asarray(resize_matrix(o, n, method), x.dtype) for o, n in zip(old, new, strict=True)
        )
        y = x.reshape(x.shape[0], *old, x.shape[-1])
        y = jnp.einsum("yh,bhwc->bywc", rows, y, precision=jax.lax.Precision.HIGHEST)
        y = jnp.einsum("xw,bywc->byxc", columns, y, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(x.shape[0], new[0] * new[1], x.shape[-1])


def reuse_matrix(old: int, new: int) -> np.ndarray:
    """Weights `[new, old]` of DVT's up-sampling along one axis.

    Nearest neighbour by the factor ceil(new / old), then adaptive average
    pooling; every row sums to 1. For 7 -> 10 and 10 -> 14 that is the official
    code's way over 14 and 20 cells.
    """
    factor = -(-new // old)
    weights = np.zeros((new, old))
    for row in range(new):
        first, last = row * old * factor // new, -(-(row + 1) * old * factor // new)
        for cell in range(first, last):
            weights[row, cell // factor] += 1 / (last - first)
    return weights


def reuse_axis(x: Array, axis: int, old: tuple[int, int], new: tuple[int, int]) -> Array:
    """Resizes one axis that runs over the cells of a grid, row-major, by `reuse_matrix`.

    Args:
      x: any shape with old[0] * old[1] cells along `axis`.
    """
    axis %= x.ndim
    if x.shape[axis] != old[0] * old[1]:
        raise ValueError(f"{x.shape[axis]} rows do not fill a grid of {tuple(old)}")
    with jax.named_scope("resize"):
        rows, columns = (jnp.asarray(reuse_matrix(o, n), x.dtype) for o, n in zip(old, new, strict=True))
        before, after = math.prod(x.shape[:axis]), x.shape[axis + 1 :]
        y = x.reshape(before, *old, math.prod(after))
        y = jnp.einsum("yh,bhwc->bywc", rows, y, precision=jax.lax.Precision.HIGHEST)
        y = jnp.einsum("xw,bywc->byxc", columns, y, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(*x.shape[:axis], new[0] * new[1], *after)


def reuse_maps(x: Array, *, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Array:
    """Resizes both axes of attention maps, `[..., prefix + N, prefix + N]`.

    Prefix rows and columns are resized along their other axis only: E x E^T with
    E = blockdiag(1, kron(A, A)).
    """
    for axis in (-1, -2):
        head, cells = jnp.split(x, [prefix], axis=axis)
        x = jnp.concatenate([head, reuse_axis(cells, axis, old, new)], axis=axis)
    return x
