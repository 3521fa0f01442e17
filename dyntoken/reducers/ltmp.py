"""LTMP: rows merge and die by thresholds that each block learns."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dyntoken.ops import attend, select
from dyntoken.reducers.base import Reducer
from dyntoken.schema import Positive
from dyntoken.types import Gate, Reduction, Tokens

Array = jax.Array
HIGHEST = jax.lax.Precision.HIGHEST
EPS = 1e-5  # of the softmax in training


@flax.struct.dataclass
class Decided:
    """What one block decided about its T rows, in the order it leaves them: prefix, evens, odds.

    Attributes:
      mask: `[B, T]` rows alive after it, with straight-through gradient.
      left: `[B, T]` rows alive between merging and pruning.
      importance: `[B, T]` attention received, inf for the prefix.
      similarity: `[B, E]` best cosine of each even row.
    """

    mask: Array
    left: Array
    importance: Array
    similarity: Array


@flax.struct.dataclass
class Shares:
    """What LTMP carries through the blocks, for the loss `flops_share`: each block's decision, and the width."""

    blocks: tuple[Decided, ...] = ()
    width: int = flax.struct.field(pytree_node=False, default=0)


class Masker(nn.Module):
    """`value > threshold`, backward as `sigmoid((value - threshold) / tau)`."""

    start: float
    tau: float

    @nn.compact
    def __call__(self, value: Array) -> Array:
        threshold = self.param("threshold", nn.initializers.constant(self.start), (1,))
        # Clamped to [0, 1] forward, where the official code clamps the parameter after each step.
        threshold = threshold + jax.lax.stop_gradient(jnp.clip(threshold, 0.0, 1.0) - threshold)
        soft = jax.nn.sigmoid((value - threshold[None]) / self.tau)
        return (value > threshold[None]).astype(jnp.float32) + (soft - jax.lax.stop_gradient(soft))


class LTMP(Reducer):
    """Every block merges rows that are alike enough, then drops those that get too little attention.

    Bonnaerens and Dambre, TMLR 2023, "Learned Thresholds Token Merging and
    Pruning for Vision Transformers", section 3; Mxbonn/ltmp. Rows with even
    numbers (the class token is 0) whose best cosine with an odd row's key is
    above a threshold are merged into it, by size; then rows whose importance,
    the attention they receive, is not above another threshold are dropped. A merged
    row has the largest importance of its parts. Both thresholds are parameters, two per block;
    they start where nothing happens, and the loss `flops_share` with weight 10
    moves them. Keys count by size. Rows are put in the order evens, odds.

    How many rows are left depends on the image, so there is a mask form alone,
    with all N rows, and `keep` has no effect. The official code has two functions, which differ: its
    training class masks, and dead rows still count as queries in the mean of the attention, and in what
    is even and odd (`rows="masked"`); its inference class drops rows, one image at a time, and they do
    not (`rows="dropped"`: the same numbers, in any batch; dead rows go to the end).

    Attributes:
      rows: "masked" or "dropped", see above.
      tau: of the backward pass.
    """

    rows: Literal["masked", "dropped"] = "masked"
    tau: Positive = 0.1

    learns = True
    needs = ("keys", "probs")
    where = "inside"
    merges = True
    drops = True
    proportional = True
    forms = ("mask",)
    moves = True
    gates = True
    takes_decision = False
    from_block = 0
    default_keep = 1.0

    def site_keep(self, keep, sites, patches, prefix):
        """All rows stay, whatever `keep` says: the thresholds decide."""
        return (1.0,) * sites

    @nn.compact
    def reduce(self, tokens, seen, train, *, draws, noise, decision) -> tuple[Tokens, Reduction]:
        prefix, n = tokens.prefix, tokens.count
        alive = jnp.ones(tokens.place.shape, jnp.float32) if tokens.alive is None else tokens.alive
        queries = attend.with_prefix(alive, prefix)
        even, odd, evens = (
            slice(1, None, 2),
            slice(0, None, 2),
            n // 2,
        )  # of the patches; row 0 is the class token
        order = jnp.concatenate([jnp.arange(1, n, 2), jnp.arange(0, n, 2)])
        received = self._received(seen.probs, queries)[:, prefix:]
        host, best = _match(seen.keys[:, :, prefix:].mean(axis=1), alive, even, odd)

        merge = Masker(1.0, self.tau, name="merge_masker")(best)  # [B, E]
        moved = jax.lax.stop_gradient(merge)
        onto = jax.nn.one_hot(host, n - evens) * moved[..., None]  # [B, E, O]
        x = tokens.patches.astype(jnp.float32)
        size = tokens.size if tokens.gate is None else tokens.gate.size[:, prefix:]
        add = jnp.einsum("beo,bec->boc", onto, x[:, even] * size[:, even, None], precision=HIGHEST)
        total = size[:, odd] + jnp.einsum("beo,be->bo", onto, size[:, even])
        merged = (x[:, odd] * size[:, odd, None] + add) / jnp.where(total > 0, total, 1.0)[..., None]
        merged = jnp.where(_taken_in(onto), merged, x[:, odd])  # others keep their bits
        theirs = jnp.where(onto > 0.5, received[:, even, None], jnp.finfo(jnp.float32).min).max(axis=1)
        importance = jnp.concatenate([received[:, even], jnp.maximum(received[:, odd], theirs)], axis=1)

        left = jnp.concatenate([alive[:, even] * (1.0 - merge), alive[:, odd]], axis=1)
        stays = Masker(0.0, self.tau, name="prune_masker")(importance)
        now = jnp.where(left > 0.5, stays, left)
        own = now[:, jnp.argsort(order)]  # of the incoming rows

        rows = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], tokens.place.shape)
        target = jnp.where(moved > 0.5, evens + host, rows[:, :evens])
        target = jnp.concatenate([target, rows[:, evens:]], axis=1)
        here = jnp.concatenate([alive[:, even], alive[:, odd]], axis=1) > 0.5
        stands = here & (jnp.take_along_axis(now, target, axis=1) > 0.5)
        patches = jnp.concatenate([x[:, even], merged], axis=1).astype(tokens.x.dtype)
        mask, infinite = attend.with_prefix(now, prefix), jnp.full((now.shape[0], prefix), jnp.inf)
        best = jnp.concatenate([jnp.full((now.shape[0], prefix), -jnp.inf), best], axis=1)
        decided = Decided(
            mask, attend.with_prefix(left, prefix), jnp.concatenate([infinite, importance], axis=1), best
        )
        past = () if tokens.state is None else tokens.state.blocks
        place, size = tokens.place[:, order], jnp.concatenate([size[:, even], total], axis=1)
        if self.rows == "dropped":  # those alive first, as if the others were gone
            moves = select.order((now > 0.5).astype(jnp.float32))
            patches, place, now, size = (select.take(each, moves) for each in (patches, place, now, size))
            target = jnp.take_along_axis(select.inverse(moves, moves.shape[1]), target, axis=1)
            mask = attend.with_prefix(now, prefix)
        remap = jnp.where(stands, target, -1)[:, jnp.argsort(order)].astype(jnp.int32)
        reduction = Reduction(
            scores=jnp.where(alive > 0.5, received, -jnp.inf),
            decision=own,
            place=place,
            host=select.lookup(place, remap),
            remap=remap,
        )
        tokens = tokens.replace(
            x=jnp.concatenate([tokens.x[:, :prefix], patches], axis=1),
            alive=now,
            place=place,
            gate=Gate(policy=mask, size=attend.with_prefix(size, prefix), eps=EPS if train else None),
            state=Shares((*past, decided), tokens.x.shape[-1]),
        )
        return tokens, reduction

    def _received(self, probs: Array, queries: Array) -> Array:
        """The attention that each row gets, `[B, T]`: mean over heads and queries."""
        if self.rows == "masked":
            return probs.mean(axis=(1, 2))
        asks = (jax.lax.stop_gradient(queries) > 0.5).astype(probs.dtype)
        return jnp.einsum("bhqk,bq->bk", probs, asks) / (probs.shape[1] * asks.sum(axis=1, keepdims=True))


def _taken_in(onto: Array) -> Array:
    """Odd rows that take others in, `[B, O, 1]`."""
    return (onto > 0.5).any(axis=1)[..., None]


def _match(keys: Array, alive: Array, even: slice, odd: slice) -> tuple[Array, Array]:
    """The most similar odd row of each even one `[B, E]`, and their cosine; dead rows have 0 with all."""
    there = alive[..., None] > 0.5
    safe = jnp.where(there, keys, 1.0)
    unit = jnp.where(there, safe / jnp.linalg.norm(safe, axis=-1, keepdims=True), 0.0)
    cosine = jnp.einsum("bed,bod->beo", unit[:, even], unit[:, odd], precision=HIGHEST)
    return cosine.argmax(axis=2).astype(jnp.int32), cosine.max(axis=2)
