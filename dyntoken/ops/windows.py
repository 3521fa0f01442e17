"""Attention inside squares of a grid: what is static about it, and moving cells in and out."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
MASKED = -100.0  # added where two cells lie side by side only because the grid was rolled


def partition(x: Array, grid: tuple[int, int], side: int, shift: int = 0) -> Array:
    """Cells `[B, N, C]` to squares `[B * n, side * side, C]`, both row-major.

    Args:
      grid: (rows, columns), multiples of `side`.
      shift: rows and columns that the grid is rolled up and left by first.
    """
    batch, _, width = x.shape
    x = x.reshape(batch, *grid, width)
    if shift:
        x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
    x = x.reshape(batch, grid[0] // side, side, grid[1] // side, side, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, side * side, width)


def merge(x: Array, grid: tuple[int, int], shift: int = 0) -> Array:
    """Squares `[B * n, side * side, C]` back to cells `[B, N, C]`: undoes `partition`."""
    side, width = math.isqrt(x.shape[1]), x.shape[2]
    x = x.reshape(-1, grid[0] // side, grid[1] // side, side, side, width).transpose(0, 1, 3, 2, 4, 5)
    if shift:
        x = jnp.roll(x.reshape(-1, *grid, width), (shift, shift), axis=(1, 2))
    return x.reshape(-1, grid[0] * grid[1], width)


@functools.cache
def relative_position_index(side: int) -> np.ndarray:
    """Which row of a table of `(2 side - 1)^2` relative positions a pair (query, key) reads.

    Row-major in (row, column) of query minus key: `[side^2 * side^2]` int32.
    """
    rows, columns = np.divmod(np.arange(side * side), side)
    down = rows[:, None] - rows[None, :] + side - 1
    right = columns[:, None] - columns[None, :] + side - 1
    return (down * (2 * side - 1) + right).reshape(-1).astype(np.int32)


@functools.cache
def shift_mask(grid: tuple[int, int], side: int, shift: int) -> np.ndarray:
    """What is added to the attention logits of a rolled grid.

    Returns:
      `[n, side^2, side^2]` float32: 0 where two cells of a square were within one
      reach before the roll, else `MASKED`.
    """
    regions = [
        np.searchsorted([cells - side, cells - shift], np.arange(cells), side="right") for cells in grid
    ]
    region = 3 * regions[0][:, None] + regions[1][None, :]
    high, wide = (cells // side for cells in grid)
    region = region.reshape(high, side, wide, side).transpose(0, 2, 1, 3).reshape(-1, side * side)
    return np.where(region[:, :, None] == region[:, None, :], 0.0, MASKED).astype(np.float32)
