"""What the methods share that replace all patch rows by a fixed number of clusters."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dyntoken.ops import select
from dyntoken.reducers.base import Reducer
from dyntoken.types import Reduction, Tokens

Array = jax.Array


class Clustering(Reducer):
    """All patch rows become `keep` new ones: the clusters that a subclass finds.

    There is no mask form: a cluster has no row of its own to leave in place. Its
    parameters, if it has any, get their gradient in the gather form.
    """

    forms = ("gather",)
    merges = True
    takes_decision = False


class Mixing(Clustering):
    """Each new row is a weighted sum of all rows, with weights that are learnt.

    `shares()` gives the weights `[B, keep, n]` and the values `[B, n, C]` that
    they weigh. A row goes to the address (`remap`, `carrier`, `size`) of the new
    row in which its weight is largest. Of the rows that go to a new row, the one
    with the largest weight gives the cell (`place`) and is its row in `keep`;
    a new row to which none goes has size 0, no cell (-1) and no row (-1).
    """

    mixes = True
    sized = True

    def shares(self, tokens: Tokens) -> tuple[Array, Array]:
        """The weights `[B, keep, n]` and values `[B, n, C]`, both float32."""
        raise NotImplementedError(f"{type(self).__name__} does not implement shares()")

    def reduce(self, tokens, seen, train, *, draws, noise, decision) -> tuple[Tokens, Reduction]:
        share, values = self.shares(tokens)
        mixed = jnp.einsum("bkn,bnc->bkc", share, values, precision=select.HIGHEST)
        fixed = jax.lax.stop_gradient(share)
        remap = fixed.argmax(axis=1).astype(jnp.int32)  # [B, n]
        own = jnp.where(remap[:, None, :] == jnp.arange(self.keep)[None, :, None], fixed, -1.0)
        centres = jnp.where(own.max(axis=2) >= 0, own.argmax(axis=2), -1).astype(jnp.int32)
        return clustered(tokens, mixed, centres, remap, scores=fixed.max(axis=1), shares=share)


def clustered(
    tokens: Tokens, x: Array, centres: Array, remap: Array, *, scores: Array, shares: Array | None = None
) -> tuple[Tokens, Reduction]:
    """Tokens and record of the clusters `x [B, k, C]`.

    Args:
      centres: `[B, k]` row that gives each cluster its cell, or -1.
      remap: `[B, n]` cluster of each row.
      scores, shares: see `Reduction`.
    """
    clusters = jnp.arange(centres.shape[1], dtype=jnp.int32)[None]
    owns = select.lookup(remap, centres) == clusters  # a centre among equal rows may lie in another cluster
    place = jnp.where(owns, select.lookup(tokens.place, centres), -1)
    reduction = Reduction(
        scores=scores,
        decision=select.mask_of(centres, tokens.count),
        place=place,
        host=select.lookup(place, remap),
        remap=remap,
        keep=centres,
        shares=shares,
    )
    x = jnp.concatenate([tokens.x[:, : tokens.prefix], x.astype(tokens.x.dtype)], axis=1)
    return tokens.replace(x=x, place=place), reduction


def distances(x: Array) -> Array:
    """Euclidean distance of all pairs of rows, `[B, n, n]` float32, exactly 0 on the diagonal; no gradient."""
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    square = (x * x).sum(axis=-1)
    products = jnp.einsum("bnc,bmc->bnm", x, x, precision=select.HIGHEST)
    squared = jnp.maximum(square[:, :, None] + square[:, None, :] - 2 * products, 0.0)
    return jnp.where(jnp.eye(x.shape[1], dtype=bool)[None], 0.0, jnp.sqrt(squared))


def nearest(distance: Array, centres: Array) -> Array:
    """The nearest of `centres [B, k]` for each row, `[B, n]` int32 below k; the first of equals."""
    return select.take(distance, centres).argmin(axis=1).astype(jnp.int32)
