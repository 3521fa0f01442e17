"""MCTF: tokens fuse by similarity, informativeness and size, both ways, one step ahead."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from dyntoken.ops import merge, select
from dyntoken.ops.attend import with_prefix
from dyntoken.reducers.base import Reducer
from dyntoken.schema import Keep, NonNegative
from dyntoken.types import Reduction, Tokens

Array = jax.Array
FLOOR = 10  # rows that the official code leaves, if it can


class MCTF(Reducer):
    """Multi-criteria token fusion (Lee et al., "... with One-step-ahead Attention", CVPR 2024; mlvlab/MCTF).

    Sections 3.1 to 3.3. At every block but the first, pairs of rows at even
    and at odd places score by three criteria: cosine of the rows, how little
    attention both receive, and how few patches they stand for. The r // 2 best
    even rows go into their best odd one, then the r - r // 2 best odd ones into
    their best even one. A group becomes its mean, weighted by attention
    received times size. One step ahead: this happens at the start of the
    block, by the map of its own attention, which fuses along with the rows
    (keys summed, queries averaged), so that no second one is needed. Attention counts a
    row by size. The prefix takes no part. No parameters; it trains in the
    gather form, the only one: a fused map has no row that could be masked.

    The published training adds a second pass with fewer pairs, see
    docs/rivals.md: `losses.consistency` and `model.clone(r=...)`.

    Attributes (besides those of `Reducer`):
      r: rows that go at each site: a count, or a share of the patches. Each
        leaves at least 10 rows, prefix counted, and half of the patches. None:
        `keep` decides.
      tau_sim, tau_info, tau_size: temperatures of the three criteria: their scores count to
        the power 1 / tau; 0 leaves one out.
      bidirectional: both ways; else all r go from even to odd places.
      pooling: weights of a group's mean: "attention" (times size), "size", "none"; or "max", the
        largest value per channel.
      ahead: "map": as above. "rows": the fused rows attend anew. "end": rows fuse after the
        block's MLP by the block's attention, none ahead.
      proportional: add log(size) to the attention logits of the keys.
    """

    r: int | float | None = None
    tau_sim: NonNegative = 1.0
    tau_info: NonNegative = 20.0
    tau_size: NonNegative = 40.0
    bidirectional: bool = True
    pooling: Literal["attention", "size", "none", "max"] = "attention"
    ahead: Literal["map", "rows", "end"] = "map"
    proportional: bool = True

    where = "inside"
    needs = ("probs",)
    merges = True
    moves = True
    takes_decision = False
    forms = ("gather",)
    from_block = 1

    def site_keep(self, keep: Keep, sites: int, patches: int, prefix: int) -> Keep:
        """With `r`, counts per site; it overrules `keep`."""
        if self.r is None:
            return super().site_keep(keep, sites, patches, prefix)
        if self.r < 0:
            raise ValueError(f"r={self.r} must be at least 0: a count, or a share below 1")
        counts = []
        for _ in range(sites):
            r = int(patches * self.r) if self.r <= 0.99 else int(self.r)
            patches -= max(0, min(r, patches + prefix - FLOOR, patches // 2))
            counts.append(patches)
        return tuple(counts)

    def reduce(self, tokens, seen, train, *, draws, noise, decision) -> tuple[Tokens, Reduction]:
        n, r, prefix = tokens.count, tokens.count - self.keep, tokens.prefix
        sources, targets = merge.halves(n, prefix)
        info = jax.lax.stop_gradient(seen.probs).mean(axis=(1, 2))  # [B, T], attention received
        if r > n // 2:
            raise ValueError(
                f"{self.title} would leave {self.keep} of {n} tokens; at most half fuse at a site"
            )
        if r == 0:
            rows = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), tokens.place.shape)
            ones = jnp.ones(rows.shape, jnp.float32)
            return tokens, Reduction(0 * ones, ones, tokens.place, tokens.place, rows, None, rows)
        scores = self._scores(tokens, info, sources, targets)
        match = merge.both_ways if self.bidirectional else merge.one_way
        matching = match(scores, sources, targets, r)
        weight = self._weight(info[:, prefix:], tokens.size)
        if self.pooling == "max":
            x = merge.largest(tokens.patches, matching)
        else:
            x = merge.mean(tokens.patches, matching, weight)
        place = select.lookup(tokens.place, matching.keep)
        reduction = Reduction(
            scores=-matching.similarity,
            decision=select.mask_of(matching.keep, n),
            place=place,
            host=select.lookup(place, matching.remap),
            remap=matching.remap,
            keep=matching.keep,
            queries=weight if self.ahead == "map" else None,
        )
        x = jnp.concatenate([tokens.x[:, :prefix], x], axis=1)
        return tokens.replace(x=x, place=place), reduction

    def _scores(self, tokens: Tokens, info: Array, sources: Array, targets: Array) -> Array:
        """`[B, na, nb]` of pairs; information and size are relative to the largest of all rows."""
        x = merge.unit(jax.lax.stop_gradient(tokens.patches))
        a, b = x[:, sources], x[:, targets]
        scores = jnp.ones((1, 1, 1), jnp.float32)
        if self.tau_sim:
            cosine = jnp.einsum("bsc,btc->bst", a, b, precision=merge.HIGHEST)
            scores = (jnp.maximum(cosine + 1, 0.0) / 2) ** (1 / self.tau_sim)
        for criterion, tau in (
            (info, self.tau_info),
            (with_prefix(tokens.size, tokens.prefix), self.tau_size),
        ):
            if tau:
                little = 1 / criterion
                little = (little / little.max(axis=1, keepdims=True))[:, tokens.prefix :]
                scores = scores * (little[:, sources, None] * little[:, None, targets]) ** (1 / tau)
        return jnp.broadcast_to(scores, (x.shape[0], len(sources), len(targets)))

    def _weight(self, info: Array, size: Array) -> Array:
        """`[B, n]`, how much each row counts in its group."""
        if self.pooling == "size":
            return size
        if self.pooling != "none":
            return info * size
        return jnp.ones(size.shape, jnp.float32)
