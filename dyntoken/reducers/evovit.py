"""Evo-ViT: rows of little attention wait while the others go on, and come back."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dyntoken.ops import attend, select
from dyntoken.reducers.base import Reducer
from dyntoken.reducers.placing import concatenated, placed, taken
from dyntoken.schema import Share
from dyntoken.types import Gate, Reduction, Tokens

Array = jax.Array


@flax.struct.dataclass
class Progress:
    """What Evo-ViT carries through the blocks.

    Attributes:
      score: `[B, n]` running class attention of the rows.
      waiting: (rows `[B, w, C]`, places, scores) of those that wait, None for none or in mask form.
      sent: `[B, 1, C]` the representative row as it was formed, None without one.
      reduced: a site has been passed.
    """

    score: Array
    waiting: tuple[Array, Array, Array] | None = None
    sent: Array | None = None
    reduced: bool = flax.struct.field(pytree_node=False, default=False)


class EvoViT(Reducer):
    """Slow rows go through the blocks up to the next site, fast ones wait and are put back.

    Xu et al., AAAI 2022, "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision
    Transformer", sections 3.2 and 3.3; YifanXu74/Evo-ViT. Rows are ranked by a
    running average g of the class attention, `(1 - t) g + t a` after each block;
    rows that wait keep theirs. Rows stay in the order of their scores after they
    are put back. The official stages are `at=(4, 8)` with `keep=0.5`; `at` = all
    blocks from 4 on is its layer-wise training. Its classifier pools the patches:
    `pool="mean", final_norm=False, fc_norm=True, token_head=True`.

    Without `representative`, waiting rows stay as they are: what the official
    DeiT code does. With it they get what the paper describes (there in the LeViT
    code alone): one row more, their mean weighted by g, goes along, and what the
    blocks add to it is added to each of them when they are put back.

    Attributes:
      tradeoff: t, one number (in force after the first site, 1 ahead of it) or one per block.
      representative: the fast update of the paper.
      put_back: False leaves the rows out that wait at the end of the stack (`prunecls`).
    """

    tradeoff: Share | tuple[Share, ...] = 0.5
    representative: bool = False
    put_back: bool = True

    follows = True
    watches = ("cls",)
    gates = True
    returns = True
    earliest = 1
    dialect = "evovit"
    default_keep = 0.5
    adds_row = property(lambda self: self.representative)

    def reduce(self, tokens, seen, train, *, draws, noise, decision) -> tuple[Tokens, Reduction]:
        g = tokens.state.score
        keep, wait = select.split(g if decision is None else decision, self.keep)
        if self.resolved(train) == "gather":
            return self._gather(tokens, g, keep, wait)
        now = select.mask_of(keep, tokens.count) if decision is None else decision.astype(jnp.float32)
        return self._mask(tokens, g, now, keep if decision is None else None)

    def _gather(self, tokens: Tokens, g: Array, keep: Array, wait: Array) -> tuple[Tokens, Reduction]:
        n, inverse = tokens.count, select.inverse(keep, tokens.count)
        x, place = select.take(tokens.patches, keep), taken(tokens.place, keep)
        waiting = taken((tokens.patches, tokens.place, g), wait) if self.keep < n else None
        remap, sent = inverse, None
        if self.representative and waiting is not None:
            sent = _mean(waiting[0], waiting[2])
            x = jnp.concatenate([x, sent], axis=1)
            place = _with_row(place, -1)
            remap = jnp.where(inverse < 0, self.keep, inverse)
        now = (inverse >= 0).astype(jnp.float32)
        reduction = Reduction(g, now, place, select.lookup(place, remap), remap, keep=keep)
        x = jnp.concatenate([tokens.x[:, : tokens.prefix], x], axis=1)
        state = Progress(taken(g, keep), waiting, sent, True)
        return tokens.replace(x=x, place=place, state=state), reduction

    def _mask(self, tokens: Tokens, g: Array, now: Array, keep: Array | None) -> tuple[Tokens, Reduction]:
        rows = jnp.arange(tokens.count, dtype=jnp.int32)[None]
        remap = jnp.where(now > 0.5, rows, -1)
        x, place, alive, sent = tokens.x, tokens.place, now, None
        if self.representative and self.keep < tokens.count:
            sent = _mean(tokens.patches, g * (1.0 - now))
            x = jnp.concatenate([x, sent], axis=1)
            place, alive = _with_row(place, -1), _with_row(now, 1)
            remap = jnp.where(now > 0.5, rows, tokens.count)
        reduction = Reduction(g, now, place, select.lookup(place, remap), remap, keep=keep)
        open_ = attend.with_prefix(alive, tokens.prefix)
        state = Progress(g, None, sent, True)
        gate = Gate(policy=open_, outputs=open_)
        return tokens.replace(x=x, place=place, alive=alive, gate=gate, state=state), reduction

    def follow(self, tokens: Tokens, seen: Any, *, block: int, closes: bool, last: bool) -> Tokens:
        """Updates the running class attention, and puts rows back ahead of the next site."""
        a = jax.lax.stop_gradient(seen.cls)
        state = Progress(a) if tokens.state is None else tokens.state
        n = state.score.shape[1]
        t = self._tradeoff(block, state.reduced)
        g = (1.0 - t) * state.score + t * a[:, :n] if block else a
        if tokens.alive is not None:  # mask form: waiting rows keep theirs
            g = jnp.where(tokens.alive[:, :n] > 0.5, g, state.score)
        tokens = tokens.replace(state=state.replace(score=g))
        if not closes or (last and not self.put_back) or not state.reduced:
            return tokens
        return self._put_back(tokens, tokens.state)

    def _tradeoff(self, block: int, reduced: bool) -> float:
        if not isinstance(self.tradeoff, tuple):
            return self.tradeoff if reduced else 1.0
        if block >= len(self.tradeoff):
            raise ValueError(f"tradeoff={self.tradeoff} has no entry for block {block}: give one per block")
        return self.tradeoff[block]

    def _put_back(self, tokens: Tokens, state: Progress) -> Tokens:
        x, place, g = tokens.patches, tokens.place, state.score
        n = g.shape[1]
        added = 0.0 if state.sent is None else x[:, n:] - state.sent
        x, place = x[:, :n], place[:, :n]
        if tokens.alive is not None:
            x = jnp.where(tokens.alive[:, :n, None] > 0.5, x, x + added)
        elif state.waiting is not None:
            rows, *rest = state.waiting
            x, place, g = concatenated((x, place, g), (rows + added, *rest))
        return placed(tokens, x, place).replace(alive=None, gate=None, state=Progress(g, reduced=True))


def _mean(x: Array, weight: Array) -> Array:
    """The mean of rows `x [B, n, C]` by `weight [B, n]`: `[B, 1, C]`."""
    total = weight.sum(axis=1, keepdims=True)
    share = weight / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bn,bnc->bc", share.astype(x.dtype), x)[:, None]


def _with_row(x: Array, value: int) -> Array:
    return jnp.concatenate([x, jnp.full_like(x[:, :1], value)], axis=1)
