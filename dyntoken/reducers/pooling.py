"""The baseline that looks at nothing: patches of each 2 x 2 square become their mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.ops import select
from dyntoken.reducers.base import Reducer
from dyntoken.types import Reduction, Tokens

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

    def reduce(self, tokens, seen, train, *, draws, noise, decision) -> tuple[Tokens, Reduction]:
        masked, side = self.resolved(train) == "mask", self.pools
        step = side**self.stage  # cells from one row alive to the next
        cells = np.arange(tokens.initial).reshape(tokens.grid)[::step, ::step]
        rows = cells if masked else np.arange(cells.size).reshape(cells.shape)
        first = rows[::side, ::side]  # of each square
        if first.size != self.keep:
            raise ValueError(
                f"{self.title} leaves {first.size} of {rows.size} tokens, not {self.keep}: leave keep_round_to out"
            )

        def of_batch(values: np.ndarray) -> Array:
            return jnp.broadcast_to(
                jnp.asarray(values.reshape(-1), jnp.int32), (tokens.x.shape[0], values.size)
            )

        row, column = np.indices(rows.shape) // side
        keep, remap = of_batch(first), np.full(tokens.count, -1)
        remap[rows] = (
            first[row, column] if masked else np.arange(first.size).reshape(first.shape)[row, column]
        )
        x, place, now = tokens.patches, tokens.place, select.mask_of(keep, tokens.count)
        if masked:
            x = x.reshape(x.shape[0], *tokens.grid, x.shape[-1])
            pooled = _means(x[:, ::step, ::step], side)
            x = x.at[:, :: step * side, :: step * side].set(pooled).reshape(tokens.patches.shape)
        else:
            x = _means(x.reshape(x.shape[0], *rows.shape, x.shape[-1]), side)
            x = x.reshape(x.shape[0], first.size, x.shape[-1])
            place = select.lookup(place, keep)
        host = select.lookup(place, of_batch(remap))
        scores = jnp.zeros(now.shape, jnp.float32)
        reduction = Reduction(scores, now, place, host, of_batch(remap), None, keep)
        x = jnp.concatenate([tokens.x[:, : tokens.prefix], x], axis=1)
        return tokens.replace(x=x, place=place, alive=now if masked else None), reduction


def _means(x: Array, side: int) -> Array:
    """Means of squares `[B, H, W, C]` to `[B, ceil(H / side), ceil(W / side), C]`; those at an edge may be smaller."""
    beyond = [(0, -length % side) for length in x.shape[1:3]]

    def sums(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), *beyond, (0, 0)]) if any(more for _, more in beyond) else x
        batch, height, width, channels = x.shape
        return x.reshape(batch, height // side, side, width // side, side, channels).sum(axis=(2, 4))

    counts = sums(np.ones((1, *x.shape[1:3], 1), np.float32))
    return (sums(x.astype(jnp.float32)) / counts).astype(x.dtype)
