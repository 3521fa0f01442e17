"""The baseline that looks at nothing: patches of each 2 x 2 square become their mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.ops import select
from dyntoken.reducers.base import Reducer
from dyntoken.types import Reduction

Array = jax.Array


class Pooling(Reducer):
    """Structural downsampling (Rao et al., "DynamicViT", NeurIPS 2021, section 4.3, there ahead of block 6 of DeiT-S).

    A site halves the grid along each axis; at an odd edge fewer patches share a
    row. Where `at` lies decides what it costs, `keep` has no effect. No parameters; it
    trains in the gather form.
    """

    merges = True
    takes_decision = False
    pools = 2
    default_keep = 0.25

    def reduce(self, tokens, seen, train, *, draws, noise, decision) -> tuple:
        step = self.pools**self.stage  # cells from one row alive to the next, along each axis
        rows, corner = _squares(tokens.grid, step, self.pools)
        masked = self.resolved(train) == "mask"
        alive = (
            np.arange(tokens.count) if not masked else rows
        )  # which rows hold the cells of this site's grid
        if len(corner[0]) != self.keep or len(alive) != len(rows):
            raise ValueError(
                f"{self.title} leaves {len(corner[0])} of {len(rows)} tokens, not {self.keep}: leave "
                "keep_round_to out"
            )
        first, host = corner  # of each square: its first row; of each row: its square
        pooled = _means(tokens.patches[:, alive], host, len(first))
        batch = tokens.x.shape[0]

        def of_batch(values: np.ndarray) -> Array:
            return jnp.broadcast_to(jnp.asarray(values, jnp.int32), (batch, len(values)))

        remap, keep = host, first
        x, place, now = pooled, select.lookup(tokens.place, of_batch(first)), None
        if masked:
            keep = rows[first]
            remap = np.full(tokens.count, -1)
            remap[rows] = keep[host]
            x, place = tokens.patches.at[:, keep].set(pooled), tokens.place
        now = select.mask_of(of_batch(keep), tokens.count)
        remap = of_batch(remap)
        host_cells = select.lookup(place, remap)
        scores = jnp.zeros(now.shape, jnp.float32)
        reduction = Reduction(scores, now, place, host_cells, remap, None, of_batch(keep))
        x = jnp.concatenate([tokens.x[:, : tokens.prefix], x], axis=1)
        return tokens.replace(x=x, place=place, alive=now if masked else None), reduction


def _squares(
    grid: tuple[int, int], step: int, pools: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Cells of the grid that is left (every `step`-th), and of these the first of each square and each one's square."""
    down, right = (np.arange(0, side, step) for side in grid)
    cells = (down[:, None] * grid[1] + right[None]).reshape(-1)
    i, j = np.divmod(np.arange(len(cells)), len(right))
    host = (i // pools) * -(-len(right) // pools) + j // pools
    first = np.unique(host, return_index=True)[1]
    return cells, (first, host)


def _means(x: Array, host: np.ndarray, squares: int) -> Array:
    """Mean of the rows `[B, n, C]` of each square: `[B, squares, C]`."""
    order = np.argsort(host, kind="stable")
    sizes = np.bincount(host, minlength=squares)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    total = 0.0
    for number in range(sizes.max()):  # the first row of each square, the second one, ...
        there = number < sizes
        rows = order[np.where(there, starts + number, 0)]
        total += jnp.where(there[None, :, None], x[:, rows].astype(jnp.float32), 0.0)
    return (total / sizes[None, :, None].astype(np.float32)).astype(x.dtype)
