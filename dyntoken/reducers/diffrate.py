"""DiffRate: per block some rows are pruned and some merged; how many of each can be learnt."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.ops import merge, select
from dyntoken.reducers.merging import Merged, Merging
from dyntoken.schema import Count, Share
from dyntoken.types import Reduction, Tokens

Array = jax.Array


class DiffRate(Merging):
    """Differentiable compression rates (Chen et al., ICCV 2023; OpenGVLab/DiffRate).

    Sections 3.1 and 3.2: at every block, between attention and MLP, rows are ranked by the class
    token's attention. The first p stay, the others are pruned; of those p the
    last go into their most similar one of the first `keep` (cosine of the rows
    themselves), as a plain mean. Attention counts a row by the patches it
    stands for, a merged one times its cosine (`Tokens.weight`). On trained
    weights, as `ToMe`, or with learnt counts:

    Section 3.3: per block a distribution over candidate counts for p and one for
    `keep`; their means, rounded up, are what training uses, in mask form, and the
    mask carries the gradient of the probability that a row stays. The loss
    `multiply_adds` holds them to a budget; `learnt_counts` reads them off.

    Attributes (besides those of `Reducer`):
      prune: rows that pruning leaves, one count per site; or the share of what goes that is
        pruned, the rest being merged.
      learn: training learns the counts; evaluation goes by `keep` and `prune` all the same.
      granularity: step between candidate counts.
      reference: as the code in evaluation: weights below 1, which similar rows get and which its
        own training lifts to 1, stay as they are (negative ones give NaN).
    """

    prune: Share | tuple[Count, ...] = 0.5
    learn: bool = False
    granularity: Count = 4
    reference: bool = False

    needs = ("cls",)
    proportional = True
    drops = True
    learns = property(lambda self: self.learn)

    def pruned_to(self, n: int) -> int:
        """Rows that pruning leaves of n."""
        if isinstance(self.prune, tuple):
            if self.stage >= len(self.prune):
                raise ValueError(
                    f"prune={self.prune} has no entry for site {self.stage}: give one count per site"
                )
            return max(self.keep, min(n, self.prune[self.stage]))
        return n - round((n - self.keep) * self.prune)

    def merge(self, tokens: Tokens, seen, train: bool) -> Merged:
        n, kept, staying = tokens.count, self.keep, self.pruned_to(tokens.count)
        ranked = select.order(seen["cls"])
        keep, source = ranked[:, :kept], ranked[:, kept:staying]
        similarity = _cosine(tokens.patches)
        pair = jnp.take_along_axis(similarity, source[:, :, None], axis=1)
        pair = jnp.take_along_axis(pair, keep[:, None, :], axis=2)  # [B, r, k]
        host = pair.argmax(axis=-1).astype(jnp.int32)
        remap = select.inverse(keep, n)
        hit = source[:, :, None] == jnp.arange(n, dtype=jnp.int32)[None, None, :]
        remap = jnp.where(hit.any(axis=1), jnp.where(hit, host[:, :, None], 0).sum(axis=1), remap)
        matching = merge.Matching(keep, source, remap, seen["cls"])
        weight = tokens.key_weight
        own, theirs = (jnp.take_along_axis(weight, rows, axis=1) for rows in (keep, source))
        theirs = theirs * pair.max(axis=-1)
        if not self.reference:
            own, theirs = jnp.maximum(own, 1.0), jnp.maximum(theirs, 1.0)
        weight = own + (merge.into(matching) * theirs[..., None]).sum(axis=1)
        return Merged(merge.mean(tokens.patches, matching), keep, remap, seen["cls"], weight)

    @nn.compact
    def reduce(self, tokens, seen, train, *, draws, noise, decision) -> tuple[Tokens, Reduction]:
        if self.learn:
            kept = [self._learnt(name, tokens.initial) for name in ("prune", "merge")]
            if train and self.resolved(train) == "mask":
                return self._by_learnt(tokens, seen, *kept)
        return super().reduce(tokens, seen, train, draws=draws, noise=noise, decision=decision)

    def _learnt(self, name: str, first: int) -> tuple[Array, Array]:
        """`(count, [first] probability that the row of each rank stays)`; the count is rounded up straight-through."""
        candidates = candidate_counts(first, self.granularity, self.block)
        shares = jax.nn.softmax(self.param(name, nn.initializers.zeros, (len(candidates),)))
        count = (shares * candidates).sum()
        count += jax.lax.stop_gradient(jnp.ceil(count) - count)
        stays = np.arange(first)[None, :] < candidates[:, None]
        return count, (shares[:, None] * stays).sum(axis=0)

    def _by_learnt(self, tokens: Tokens, seen, prune, join) -> tuple[Tokens, Reduction]:
        """Rows in the order of their attention; those beyond the counts are dead."""
        n, prefix = tokens.count, tokens.prefix
        ranked, rank = select.order(seen.cls), jnp.arange(n)[None, :]
        x, place = select.take(tokens.patches, ranked), select.lookup(tokens.place, ranked)
        alive, weight = (jnp.take_along_axis(a, ranked, axis=1) for a in (tokens.alive, tokens.key_weight))
        (staying, prune_share), (kept, join_share) = prune, join
        lives = jax.lax.stop_gradient(alive) > 0.5
        source = lives & (rank >= kept) & (rank < staying)
        similarity = jnp.where((rank < kept)[:, None, :], _cosine(x), -jnp.inf)
        host = similarity.argmax(axis=-1).astype(jnp.int32)
        chosen = host[:, :, None] == rank[:, None, :]
        cosine = jnp.where(chosen, similarity, 0.0).sum(axis=-1)
        at = (chosen & source[:, :, None]).astype(jnp.float32)  # [B, source, target]
        total = x.astype(jnp.float32) + jnp.einsum(
            "bst,bsc->btc", at, x.astype(jnp.float32), precision=merge.HIGHEST
        )
        x = (total / (1 + at.sum(axis=1))[..., None]).astype(x.dtype)
        weight = jnp.maximum(jnp.where(source, weight * cosine, weight), 1.0)
        weight = weight + jnp.einsum("bst,bs->bt", at, weight, precision=merge.HIGHEST)
        # As in the code: a count that takes nothing here has no gradient, and neither step kills a row twice.
        before = lives.sum(axis=1, keepdims=True)  # [B, 1]
        steps = (
            (~lives | (rank < staying), staying < before, prune_share),
            (~source, source.any(axis=1, keepdims=True), join_share),
        )
        for stays, happens, share in steps:
            through = stays + share[None, :] - jax.lax.stop_gradient(share)[None, :]
            alive = alive * jnp.where(happens, through, 1.0)
        rows = jnp.where(source, host, jnp.where(lives & (rank < jnp.minimum(staying, kept)), rank, -1))
        back = select.inverse(ranked, n)
        remap = jnp.take_along_axis(rows, back, axis=1).astype(jnp.int32)
        now = jnp.take_along_axis(alive, back, axis=1)
        counts = jnp.stack([staying, kept])
        reduction = Reduction(
            seen.cls, now, place, select.lookup(place, remap), remap, None, None, learnt=counts
        )
        x = jnp.concatenate([tokens.x[:, :prefix], x], axis=1)
        return tokens.replace(x=x, place=place, alive=alive, weight=weight), reduction


def candidate_counts(first: int, granularity: int, block: int) -> np.ndarray:
    """Candidate counts of patches, falling in steps; block 0 has one, all of them."""
    step = granularity if block else first
    return np.arange(first, 0, -step).astype(np.float32)


def learnt_counts(model: Any, params: Any) -> dict[str, tuple[int, ...]]:
    """The learnt `keep` and `prune` per site, for `create_model`; rows gone before may be among those of `prune`.

    Args:
      model: with `learn=True`, of an isotropic backbone.
      params: its parameters.
    """
    rows, columns = model.plain().grid
    first = current = rows * columns
    found: dict[str, list[int]] = {"keep": [], "prune": []}
    for stage, site in enumerate(model.sites()):
        of_site = params["backbone"]["trunk"][f"reducer_{stage}"]
        steps = (site.reducer.get("granularity", DiffRate.granularity), site.at)
        prune, join = (math.ceil(mean_count(of_site[name], first, *steps)) for name in ("prune", "merge"))
        found["prune"].append(prune)
        current = min(prune, join, current)
        found["keep"].append(current)
    return {name: tuple(counts) for name, counts in found.items()}


def mean_count(logits: Array, first: int, granularity: int, block: int) -> float:
    """The mean of a distribution over candidate counts, before it is rounded up."""
    return float((jax.nn.softmax(jnp.asarray(logits)) * candidate_counts(first, granularity, block)).sum())


def _cosine(x: Array) -> Array:
    """`[B, n, n]` of rows `[B, n, C]`, a row with itself left as it is."""
    rows = merge.unit(x)
    return jnp.einsum("bnc,bmc->bnm", rows, rows, precision=merge.HIGHEST)
