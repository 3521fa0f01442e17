"""Values for the empty cells of a grid, from those that are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dyntoken.ops import select

Array = jax.Array


def between(cells: Array, known: Array, grid: tuple[int, int]) -> Array:
    """Empty cells by linear interpolation along their row and their column.

    Where the nearest known cells on both sides in a cell's row are a and b, its value lies on
    the line between them, likewise in its column; of two such values the mean is taken, weighted by one
    over the distance from a to b. So a linear ramp is exact wherever a row or a column is known on both
    sides. A cell without takes the mean of all known ones, weighted by one over the squared
    distance (Shepard 1968). All values lie within the range of the known ones.

    Args:
      cells: `[B, H W, C]`, row-major; what stands in empty ones does not count.
      known: `[B, H W]` bool; an image with none gives zeros.
      grid: (H, W).

    Returns:
      `[B, H W, C]` in the type of `cells`, known cells as they are.
    """
    batch = cells.shape[0]
    numbers = jnp.arange(grid[0] * grid[1], dtype=jnp.int32).reshape(grid)
    there = known.reshape(batch, *grid)
    source = jnp.where(known[..., None], cells, 0).astype(jnp.float32)
    total = jnp.zeros(source.shape, jnp.float32)
    weight = jnp.zeros((*known.shape, 1), jnp.float32)
    for axis in (1, 2):
        step = grid[1] if axis == 1 else 1  # from a cell to the next along the axis
        at = jnp.where(there, numbers[None], -1)
        before = jax.lax.cummax(at, axis=axis).reshape(batch, -1)
        at = jnp.where(there, numbers[None], numbers.size)
        after = jax.lax.cummin(at, axis=axis, reverse=True).reshape(batch, -1)
        both = (before >= 0) & (after < numbers.size)
        before, after = jnp.where(both, before, -1), jnp.where(both, after, -1)
        gap = jnp.maximum((after - before) // step, 1).astype(jnp.float32)[..., None]
        share = ((numbers.reshape(1, -1) - before) // step).astype(jnp.float32)[..., None] / gap
        first, second = select.gather_or_zero(source, before), select.gather_or_zero(source, after)
        counts = both[..., None] / gap
        total += counts * ((1 - share) * first + share * second)
        weight += counts
    line = total / jnp.where(weight > 0, weight, 1)
    filled = jnp.where(weight > 0, line, _shepard(source, known, grid))
    return jnp.where(known[..., None], cells, filled.astype(cells.dtype))


def _shepard(cells: Array, known: Array, grid: tuple[int, int]) -> Array:
    """The mean of all known cells, weighted by one over the squared distance."""
    y, x = (axis.reshape(-1) for axis in jnp.meshgrid(*map(jnp.arange, grid), indexing="ij"))
    square = (y[:, None] - y[None]) ** 2 + (x[:, None] - x[None]) ** 2
    near = 1.0 / jnp.maximum(square, 1)[None] * known[:, None]  # [B, to, from]
    total = jnp.einsum("btf,bfc->btc", near, cells, precision=select.HIGHEST)
    weight = near.sum(axis=-1, keepdims=True)
    return total / jnp.where(weight > 0, weight, 1)
