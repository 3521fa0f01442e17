"""What methods have in common that merge a fixed number of rows at every site, in both forms."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dyntoken.ops import merge, select
from dyntoken.reducers.base import Reducer
from dyntoken.types import Reduction, Tokens

Array = jax.Array


class Merged(NamedTuple):
    """n patch rows alive came in, k went out.

    Attributes:
      x: `[B, k, C]`.
      keep: `[B, k]` incoming row that each outgoing one continues.
      remap: `[B, n]` outgoing row of each incoming one, or -1.
      scores: `[B, n]` float32, higher is kept first.
      weight: `[B, k]`, `Tokens.weight` of those that go out; None for their sizes.
    """

    x: Array
    keep: Array
    remap: Array
    scores: Array
    weight: Array | None = None


class Merging(Reducer):
    """Base: a subclass implements `merge` on rows that are all alive.

    The pairs of such methods depend on the order of the rows, which a site
    changes. So the mask form is the gather form with the rows that were merged
    put behind the others, dead: what `merge` sees is the same in both.
    """

    where = "inside"
    merges = True
    moves = True
    takes_decision = False
    from_block = 0

    def merge(self, tokens: Tokens, seen, train: bool) -> Merged:
        """The method itself; `tokens` and `seen` are those of the rows alive."""
        raise NotImplementedError(f"{type(self).__name__} does not implement merge()")

    def by_keys(self, tokens: Tokens, seen, **options: bool) -> merge.Matching:
        """Even rows into odd ones by the cosine of their keys, averaged over heads (ToMe, section 3)."""
        sources, targets = merge.halves(tokens.count, tokens.prefix)
        self.check_pairs(tokens.count, len(sources))
        metric = seen["keys"][:, :, tokens.prefix :].astype(jnp.float32).mean(axis=1)
        return merge.bipartite(metric, sources, targets, tokens.count - self.keep, **options)

    def check_pairs(self, count: int, most: int) -> None:
        """Raises ValueError where `keep` leaves more to merge than there are pairs."""
        if count - self.keep > most:
            raise ValueError(
                f"{self.title} would leave {self.keep} of {count} tokens at block {self.block}, but at most "
                f"{most} merge at a site: keep at least {count - most}, or have more sites (at=...)"
            )

    def reduce(self, tokens, seen, train, *, draws, noise, decision) -> tuple[Tokens, Reduction]:
        total, count = tokens.count, self.current or tokens.count
        merged = self.merge(
            _first(tokens, count), _first_seen(seen, self.needs, tokens.prefix + count, count), train
        )
        x, place = merged.x, select.lookup(tokens.place, merged.keep)
        host, remap = select.lookup(place, merged.remap), merged.remap
        stays = select.mask_of(merged.keep, count)
        alive, scores, weight = None, merged.scores, merged.weight
        if self.resolved(train) == "mask":
            last = (jnp.arange(total) >= count).astype(jnp.float32)
            behind = select.split(
                jnp.pad(1 - stays, [(0, 0), (0, total - count)]) + last[None], total - self.keep
            )[0]
            x = jnp.concatenate([x, select.take(tokens.patches, behind)], axis=1)
            place = jnp.concatenate([place, select.lookup(tokens.place, behind)], axis=1)
            alive = jnp.broadcast_to((jnp.arange(total) < self.keep).astype(jnp.float32), place.shape)
            rest = [(0, 0), (0, total - count)]
            host, remap = (jnp.pad(rows, rest, constant_values=-1) for rows in (host, remap))
            weight = weight if weight is None else jnp.pad(weight, rest[:1] + [(0, total - self.keep)])
            stays, scores = jnp.pad(stays, rest), jnp.pad(scores, rest, constant_values=-jnp.inf)
        reduction = Reduction(scores, stays, place, host, remap, None, merged.keep)
        x = jnp.concatenate([tokens.x[:, : tokens.prefix], x], axis=1)
        return tokens.replace(x=x, place=place, alive=alive, weight=weight), reduction


def unchanged(tokens: Tokens) -> Merged:
    """Nothing merges: rows stay as and where they are."""
    rows = jnp.broadcast_to(jnp.arange(tokens.count, dtype=jnp.int32), tokens.place.shape)
    return Merged(tokens.patches, rows, rows, jnp.zeros(rows.shape, jnp.float32))


def _first(tokens: Tokens, count: int) -> Tokens:
    if tokens.count == count:
        return tokens
    place, size = tokens.place[:, :count], tokens.size[:, :count]
    weight = tokens.weight if tokens.weight is None else tokens.weight[:, :count]
    x = tokens.x[:, : tokens.prefix + count]
    return tokens.replace(x=x, alive=None, place=place, size=size, weight=weight)


def _first_seen(seen, needs, rows: int, count: int):
    """What `needs` names, of the first rows."""
    cut = {
        "cls": lambda a: a[:, :count],
        "keys": lambda a: a[:, :, :rows],
        "probs": lambda a: a[:, :, :rows, :rows],
    }
    return {need: cut[need](getattr(seen, need)) for need in needs}
