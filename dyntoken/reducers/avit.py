"""A-ViT: every row decides for itself after which block it halts."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dyntoken.ops import attend, select
from dyntoken.reducers.base import Reducer
from dyntoken.reducers.placing import taken
from dyntoken.schema import Positive
from dyntoken.types import Gate, Reduction, Tokens

Array = jax.Array
LIMIT = 0.99  # a row halts once its halting scores sum up to more


@flax.struct.dataclass
class Halting:
    """What A-ViT carries through the blocks, and what its losses read; T rows, the prefix included.

    Attributes:
      alive: `[B, T]` 1.0 for rows that go on.
      total, rest: `[B, T]` sum of the halting scores so far, and what is left of 1.
      output: `[B, T, C]` float32, the states of each row so far, weighted by halting score.
      ponder: `[B, T]` number of blocks of each row, and its rest where it halted.
      depth: `[B, T]` number of blocks after which a row went on, and 1.
      scores, masks: per block `[B, T]`, its halting scores and the rows alive in it.
      prefix: number of leading rows that are no patches.
    """

    alive: Array
    total: Array
    rest: Array
    output: Array
    ponder: Array
    depth: Array
    scores: tuple[Array, ...] = ()
    masks: tuple[Array, ...] = ()
    prefix: int = flax.struct.field(pytree_node=False, default=1)

    @classmethod
    def start(cls, tokens: Tokens) -> Halting:
        """Before the first block."""
        zeros = jnp.zeros(tokens.x.shape[:2], jnp.float32)
        ones = jnp.ones_like(zeros)
        output = jnp.zeros(tokens.x.shape, jnp.float32)
        return cls(ones, zeros, ones, output, zeros, ones, prefix=tokens.prefix)


class AViT(Reducer):
    """Rows halt by a score that is channel 0 of their own state; their output is a weighted mean over depth.

    Yin et al., CVPR 2022, "A-ViT: Adaptive Tokens for Efficient Vision
    Transformer", section 3; NVlabs/A-ViT. After each block
    `h = sigmoid(gate_scale * x[..., 0] - gate_center)`; a row, the class token
    too, halts when its h add up to more than 0.99, or after the last block. The
    published tiny model has scale 10 and centre 30, the small one 10 and 75. A row that
    halted is zero to others: forward its data are set to 0, backward they pass.
    Losses `ponder` and `halting_prior` train it (0.0005 and 0.001).

    **The official code removes no row**: it masks, and estimates what could be
    saved. So does this with the default `keep=1.0`, in both forms. A `keep` below
    1 at the sites is a bound that saves in gather form: only so many rows go
    on, those with the smallest sum of scores; a row beyond them is dropped, and
    halts there if it had not yet. Where no more rows than that are alive, all
    others come out as without a bound.

    Attributes:
      gate_scale, gate_center: gamma and beta.
    """

    gate_scale: Positive = 10.0
    gate_center: float = 30.0

    follows = True
    gates = True
    earliest = 1
    default_keep = 1.0

    def reduce(self, tokens, seen, train, *, draws, noise, decision) -> tuple[Tokens, Reduction]:
        n, state = tokens.count, tokens.state
        rank = -state.total[:, tokens.prefix :]
        if tokens.alive is not None:
            rank = jnp.where(tokens.alive > 0.5, rank, -jnp.inf)
        rows = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), rank.shape)
        choice = rank if decision is None else decision
        keep = select.split(choice, self.keep)[0] if self.keep < n else rows
        if self.resolved(train) == "gather":
            return self._gather(tokens, rank, keep)
        now = select.mask_of(keep, n) if decision is None else decision.astype(jnp.float32)
        now = now if tokens.alive is None else now * tokens.alive
        stays = attend.with_prefix(now, tokens.prefix)
        cut = state.alive * (1.0 - stays)  # halts here, with all that is left
        output = state.output + tokens.x * (cut * state.rest)[..., None]
        state = state.replace(
            alive=state.alive * stays, output=output, ponder=state.ponder + cut * state.rest
        )
        remap = jnp.where(now > 0.5, rows, -1)
        host = select.lookup(tokens.place, remap)
        reduction = Reduction(rank, now, tokens.place, host, remap, keep=keep if decision is None else None)
        return _gated(tokens.replace(alive=now, state=state)), reduction

    def _gather(self, tokens: Tokens, rank: Array, keep: Array) -> tuple[Tokens, Reduction]:
        n = tokens.count
        place, remap = taken(tokens.place, keep), select.inverse(keep, n)
        now = (remap >= 0).astype(jnp.float32)
        reduction = Reduction(rank, now, place, select.lookup(place, remap), remap, keep=keep)
        if self.keep < n:
            rows = select.shift_past_prefix(keep, tokens.prefix)
            state = tokens.state
            x, new = taken((tokens.x, state.replace(scores=(), masks=())), rows)
            state = new.replace(scores=state.scores, masks=state.masks)
            tokens = _gated(tokens.replace(x=x, place=place, state=state))
        return tokens, reduction

    def follow(self, tokens: Tokens, seen: Any, *, block: int, closes: bool, last: bool) -> Tokens:
        """Adds the block's state to the output of the rows alive, and halts those that have enough."""
        state = Halting.start(tokens) if tokens.state is None else tokens.state
        x, alive = tokens.x.astype(jnp.float32), state.alive
        h = jax.nn.sigmoid(self.gate_scale * x[..., 0] - self.gate_center)
        step = jnp.ones_like(h) if last else h
        total = state.total + step
        reached = alive * (total > LIMIT)
        goes = alive * (total < LIMIT)
        state = Halting(
            alive=goes,
            total=total,
            rest=state.rest - goes * step,
            output=state.output + x * (alive * (state.rest * reached + step * goes))[..., None],
            ponder=state.ponder + alive + state.rest * reached,
            depth=state.depth + goes,
            scores=(*state.scores, h),
            masks=(*state.masks, alive),
            prefix=state.prefix,
        )
        if last:
            return tokens.replace(x=state.output.astype(tokens.x.dtype), gate=None, state=state)
        return _gated(tokens.replace(state=state))


def _gated(tokens: Tokens) -> Tokens:
    """`tokens` whose halted rows are zero (their gradient passes) and hidden from the next block."""
    alive = tokens.state.alive
    masked = tokens.x * alive.astype(tokens.x.dtype)[..., None]
    x = tokens.x + jax.lax.stop_gradient(masked - tokens.x)
    return tokens.replace(x=x, gate=Gate(policy=alive, rows=alive))
