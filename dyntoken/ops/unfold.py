"""Overlapping windows of a grid: the soft split of T2T-ViT."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def count(size: int, kernel: int, stride: int, padding: int) -> int:
    """Number of windows along an axis of `size` cells."""
    return (size + 2 * padding - kernel) // stride + 1


def unfold(x: Array, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Array:
    """Windows of a grid as rows of features, torch's `nn.Unfold`.

    One axis at a time by strided slices: a few pads in the backward pass, where
    a gather would scatter and a convolution with an identity would multiply.

    Args:
      x: `[B, H, W, C]`.
      kernel, stride, padding: (vertical, horizontal); zeros pad both sides.

    Returns:
      `[B, h, w, C * kh * kw]`, channel slowest, as torch orders them.
    """
    x = jnp.pad(x, ((0, 0), *((p, p) for p in padding), (0, 0)))
    x = _windows(x, 1, kernel[0], stride[0])  # [B, h, kh, W, C]
    x = _windows(x, 3, kernel[1], stride[1])  # [B, h, kh, w, kw, C]
    batch, high, _, wide, _, channels = x.shape
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, high, wide, channels * kernel[0] * kernel[1])


def _windows(x: Array, axis: int, kernel: int, stride: int) -> Array:
    """Replaces `axis` by (window, position in it)."""
    span = stride * (count(x.shape[axis], kernel, stride, 0) - 1) + 1
    parts = [jax.lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(kernel)]
    return jnp.stack(parts, axis=axis + 1)
