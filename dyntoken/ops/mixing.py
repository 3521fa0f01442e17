"""What mixing images and mixing tokens share: pairs of rows and random boxes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def partner(x: Array) -> Array:
    """Swaps rows 2i and 2i + 1 of `x [B, ...]`, B even.

    Fixed pairs stay together on any number of devices.
    """
    pairs = x.reshape(x.shape[0] // 2, 2, *x.shape[1:])
    return pairs[:, ::-1].reshape(x.shape)


def span(key: Array, length: int, lam: Array) -> Array:
    """`[length]` bool: a box of share 1 - lam along one axis, around a uniform centre."""
    half = jnp.floor(length * jnp.sqrt(1.0 - lam)).astype(jnp.int32) // 2
    centre = jax.random.randint(key, (), 0, length)
    cell = jnp.arange(length, dtype=jnp.int32)
    return (cell >= centre - half) & (cell < centre + half)


def box(key: Array, grid: tuple[int, int]) -> Array:
    """A random box of MixToken: `[rows, columns]` bool, lambda uniform in (0, 1).

    Jiang et al. 2021, "All Tokens Matter" (zihangJiang/TokenLabeling,
    `rand_bbox` with Beta(1, 1)): CutMix's box on the token grid.
    """
    k_lam, k_row, k_column = jax.random.split(key, 3)
    lam = jax.random.uniform(k_lam)
    return span(k_row, grid[0], lam)[:, None] & span(k_column, grid[1], lam)[None, :]


def swap(rows: Array, cells: Array) -> Array:
    """`rows [B, N, ...]` with those in `cells [N]` (bool) taken from the partner row.

    Raises:
      ValueError: for an odd number of rows.
    """
    if rows.shape[0] % 2:
        raise ValueError(
            f"MixToken pairs rows 2i and 2i + 1, so each device needs an even number of images, not "
            f"{rows.shape[0]}: change the batch size or set mix_token=False"
        )
    inside = cells.reshape(1, -1, *(1,) * (rows.ndim - 2))
    return jnp.where(inside, partner(rows), rows)
