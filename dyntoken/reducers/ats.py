"""ATS: tokens are drawn by the inverse of their scores' distribution, as many as the image needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dyntoken.ops import select
from dyntoken.reducers.base import Reducer
from dyntoken.types import Reduction, Tokens

Array = jax.Array


class ATS(Reducer):
    """Adaptive token sampling (Fayyaz et al., ECCV 2022, section 3), without parameters.

    A patch scores by the class token's attention to it times the length of its
    value vector. `keep` points, evenly spaced from the smallest to the largest
    value of the scores' cumulative distribution, each draw the row nearest to
    them; rows drawn twice are there once. So `keep` bounds the rows alive, whose
    number depends on the image; keep=1.0 is as published, where all the saving
    comes from repeated draws. Both forms draw the same rows: the mask form leaves
    them where they are, the gather form puts them first among `keep` rows.

    adaptivetokensampling/ATS. The distribution there begins at its smallest value
    among all rows, padded ones (0) included: where none is padded, the lowest
    row can never be drawn. In its padded form that is so until the first rows are
    gone, which is what is done here. Gradients reach the rows, not the draws.

    Attributes:
      compact: as its evaluation without padding (DROP_TOKENS): rows are cut to the
        largest count in the batch, so that the samples that have it draw as if
        none were gone. The result depends on what else is in the batch.
    """

    compact: bool = False

    needs = ("cls", "values")
    where = "inside"
    bounded = True
    moves = True

    def reduce(self, tokens, seen, train, *, draws, noise, decision) -> tuple[Tokens, Reduction]:
        alive = jnp.ones(tokens.place.shape, jnp.float32) if tokens.alive is None else tokens.alive
        values = seen.values[:, :, tokens.prefix :].astype(jnp.float32)
        score = seen.cls * jnp.sqrt(jnp.square(values).sum(axis=(1, 3))) * alive
        score = jax.lax.stop_gradient(score / jnp.maximum(score.sum(axis=1, keepdims=True), 1e-30))
        if decision is None:
            chosen = self._drawn(score, alive, tokens.initial)
        else:
            chosen = decision.astype(jnp.float32) * alive
        drawn = chosen > 0.5
        rows, _ = select.split(jnp.where(drawn, score, -jnp.inf), self.keep)
        keep = jnp.where(jnp.take_along_axis(drawn, rows, axis=1), rows, -1)
        if self.resolved(train) == "gather":
            remap = select.inverse(keep, tokens.count)
            x = jnp.concatenate([tokens.x[:, : tokens.prefix], select.take(tokens.patches, rows)], axis=1)
            place, alive = select.lookup(tokens.place, keep), (keep >= 0).astype(jnp.float32)
        else:
            number = jnp.arange(tokens.count, dtype=jnp.int32)[None]
            x, place, alive, remap = tokens.x, tokens.place, chosen, jnp.where(drawn, number, -1)
        host = select.lookup(place, remap)
        scores = jnp.where(tokens.alive > 0.5, score, -jnp.inf) if tokens.alive is not None else score
        reduction = Reduction(scores, chosen, place, host, remap, keep=keep)
        return tokens.replace(x=x, place=place, alive=alive), reduction

    def _drawn(self, score: Array, alive: Array, initial: int) -> Array:
        """`[B, n]` 1.0 for the rows drawn."""
        order = select.order(-score)  # ascending, rows that are gone first
        live = jnp.take_along_axis(alive, order, axis=1) > 0.5
        mass = jnp.cumsum(jnp.take_along_axis(score, order, axis=1), axis=1)
        count = live.sum(axis=1, keepdims=True)
        whole = count == (count.max() if self.compact else initial)
        lowest = jnp.where(live, mass, jnp.inf).min(axis=1, keepdims=True)
        start = jnp.where(whole, lowest, 0.0)
        mass = (mass - start) / jnp.maximum(mass[:, -1:] - start, 1e-30)
        first = jnp.where(mass > 0, mass, 1.0).min(axis=1, keepdims=True)
        share = jnp.arange(self.keep) / (self.keep - 1) if self.keep > 1 else jnp.ones(1)
        points = first + (1.0 - first) * share[None]  # [B, keep]
        gap = jnp.where(live[:, None, :], jnp.abs(points[:, :, None] - mass[:, None, :]), jnp.inf)
        hit = select.mask_of(gap.argmin(axis=2), score.shape[1])  # among the rows in order
        return jnp.take_along_axis(hit, select.inverse(order, score.shape[1]), axis=1) * alive
