"""Merging pairs of rows: who goes into whom, and the weighted mean of each group.

B batch, n rows in, r of them merged into others, k = n - r rows out. All counts
are static. Nothing here sorts: ranks are counted by comparison.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.ops import select

Array = jax.Array
HIGHEST = jax.lax.Precision.HIGHEST


class Matching(NamedTuple):
    """A choice of pairs.

    Attributes:
      keep: `[B, k]` int32 incoming row that each outgoing one continues.
      gone: `[B, r]` int32 rows that go into another one.
      remap: `[B, n]` int32 outgoing row of each incoming one.
      similarity: `[B, n]` float32 of a source with its best target; -1 for all others.
    """

    keep: Array
    gone: Array
    remap: Array
    similarity: Array


def unit(x: Array) -> Array:
    """Rows of length 1 in float32; zeros stay zeros."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))


def halves(n: int, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """(sources, targets) among n patch rows: even and odd places of all rows, prefix included."""
    rows = np.arange(n, dtype=np.int32)
    return rows[prefix % 2 :: 2], rows[1 - prefix % 2 :: 2]


def bipartite(
    metric: Array, sources: Array, targets: Array, r: int, **options: Array | bool | None
) -> Matching:
    """Bipartite soft matching (Bolya et al., ICLR 2023, section 3): the r best sources, each into its best target.

    Args:
      metric: `[B, n, D]`, compared by cosine.
      sources, targets, r, options: see `one_way`.
    """
    metric = unit(jax.lax.stop_gradient(metric))
    a, b = (select.take(metric, _of_batch(rows, metric.shape[0])) for rows in (sources, targets))
    return one_way(jnp.einsum("bsd,btd->bst", a, b, precision=HIGHEST), sources, targets, r, **options)


def one_way(
    scores: Array,
    sources: Array,
    targets: Array,
    r: int,
    *,
    apart: Array | None = None,
    ascending: bool = True,
) -> Matching:
    """The r best sources, each into its best target.

    Args:
      scores: `[B, na, nb]` of pairs.
      sources: `[na]` or `[B, na]` rows; targets: `[nb]` or `[B, nb]`.
      r: pairs to merge, at most na.
      apart: `[no]` or `[B, no]`, the other rows, which take no part; None: there are none.
      ascending: the sources that stay keep their order; else the most similar comes first.

    Returns:
      A `Matching`; outgoing rows are those apart, the sources that stay, the targets.
    """
    apart = jnp.zeros((0,), jnp.int32) if apart is None else apart
    sources, targets, apart = (_of_batch(rows, scores.shape[0]) for rows in (sources, targets, apart))
    best, host = scores.max(axis=-1), scores.argmax(axis=-1).astype(jnp.int32)
    rank = select.ranks(best)
    stays = rank >= r
    if ascending:
        rank = _stable(stays, rank, r)
    ordered = _by_rank(sources, rank)  # those merged come first
    keep = jnp.concatenate([apart, ordered[:, r:], targets], axis=1)
    others = apart.shape[1]
    of_source = jnp.where(stays, others + rank - r, others + sources.shape[1] - r + host)
    remap, similarity = _scattered(sources, of_source, best, select.inverse(keep, keep.shape[1] + r))
    return Matching(keep, ordered[:, :r], remap, similarity)


def both_ways(scores: Array, sources: Array, targets: Array, r: int) -> Matching:
    """Bidirectional matching (Lee et al., CVPR 2024, section 3.2).

    The r // 2 best sources go into their best target; then the targets, those
    that took some included, go the other way by the same scores: the best
    r - r // 2 of them each into its best source that stayed.

    Args:
      scores: `[B, na, nb]` of pairs.
      sources: `[na]` rows; targets: `[nb]`, all others.
      r: rows to merge.

    Returns:
      A `Matching`; outgoing rows are the sources that stay, then the targets
      that stay, the most similar first.
    """
    first, second = r // 2, r - r // 2
    sources, targets = (_of_batch(rows, scores.shape[0]) for rows in (sources, targets))
    best, host = scores.max(axis=-1), scores.argmax(axis=-1).astype(jnp.int32)
    rank = select.ranks(best)
    stays = rank >= first
    rank = _stable(stays, rank, first)
    back = jnp.where(stays[:, :, None], scores, -jnp.inf)
    best_back, host_back = back.max(axis=1), back.argmax(axis=1).astype(jnp.int32)
    rank_back = select.ranks(best_back)
    of_source, of_target = _by_rank(sources, rank), _by_rank(targets, rank_back)
    keep = jnp.concatenate([of_source[:, first:], of_target[:, second:]], axis=1)
    gone = jnp.concatenate([of_source[:, :first], of_target[:, :second]], axis=1)
    left = sources.shape[1] - first
    to = jnp.where(
        rank_back < second,
        jnp.take_along_axis(rank, host_back, axis=1) - first,
        left + rank_back - second,
    )
    of_source = jnp.where(stays, rank - first, jnp.take_along_axis(to, host, axis=1))
    rows = jnp.concatenate([sources, targets], axis=1)
    start = jnp.zeros(rows.shape, jnp.int32)
    remap, similarity = _scattered(
        rows, jnp.concatenate([of_source, to], axis=1), jnp.concatenate([best, best_back], axis=1), start
    )
    return Matching(keep, gone, remap, similarity)


def _of_batch(rows: Array, batch: int) -> Array:
    return jnp.broadcast_to(jnp.asarray(rows), (batch, rows.shape[-1]))


def _stable(stays: Array, rank: Array, r: int) -> Array:
    """Ranks where those that stay keep their order."""
    return jnp.where(stays, r + jnp.cumsum(stays, axis=1, dtype=jnp.int32) - 1, rank)


def _by_rank(rows: Array, rank: Array) -> Array:
    return jnp.take_along_axis(rows, select.inverse(rank, rank.shape[1]), axis=1)


def _scattered(rows: Array, remap: Array, similarity: Array, others: Array) -> tuple[Array, Array]:
    """`remap` and `similarity` `[B, m]` of some rows `[B, m]` among all n; of the others `others [B, n]` and -1."""
    hit = rows[:, :, None] == jnp.arange(others.shape[1], dtype=jnp.int32)[None, None, :]  # [B, m, n]
    there = hit.any(axis=1)
    remap = jnp.where(there, jnp.where(hit, remap[:, :, None], 0).sum(axis=1), others)
    return remap, jnp.where(there, jnp.where(hit, similarity[:, :, None], 0.0).sum(axis=1), -1.0)


def of_remap(keep: Array, remap: Array) -> Matching:
    """The `Matching` of its `keep` and `remap`; its similarities are zeros."""
    stays = select.mask_of(keep, remap.shape[1])
    gone = select.split(1.0 - stays, remap.shape[1] - keep.shape[1])[0]
    return Matching(keep, gone, remap, jnp.zeros(remap.shape, jnp.float32))


def mean(x: Array, matching: Matching, weight: Array | None = None) -> Array:
    """`x [B, n, C]` to `[B, k, C]`: each group's mean, by `weight [B, n]` or plain."""
    kept, merged = select.take(x, matching.keep), select.take(x, matching.gone)
    weight = jnp.ones(x.shape[:2], jnp.float32) if weight is None else weight
    own, theirs = (jnp.take_along_axis(weight, rows, axis=1) for rows in (matching.keep, matching.gone))
    at = into(matching) * theirs[..., None]
    total = own[..., None] * kept.astype(jnp.float32) + jnp.einsum(
        "brk,brc->bkc", at, merged.astype(jnp.float32), precision=HIGHEST
    )
    return (total / (own + at.sum(axis=1))[..., None]).astype(x.dtype)


def largest(x: Array, matching: Matching) -> Array:
    """`x [B, n, C]` to `[B, k, C]`: each group's largest value per channel."""
    kept, merged = select.take(x, matching.keep), select.take(x, matching.gone)
    at = into(matching)[..., None] > 0  # [B, r, k, 1]
    return jnp.maximum(kept, jnp.where(at, merged[:, :, None], -jnp.inf).max(axis=1).astype(x.dtype))


def into(matching: Matching) -> Array:
    """`[B, r, k]` 0/1: the outgoing row that each merged row goes into."""
    host = jnp.take_along_axis(matching.remap, matching.gone, axis=1)
    return jax.nn.one_hot(host, matching.keep.shape[1], dtype=jnp.float32)
