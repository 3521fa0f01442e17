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
    metric: Array,
    sources: Array,
    targets: Array,
    r: int,
    *,
    apart: Array | None = None,
    ascending: bool = True,
) -> Matching:
    """Bipartite soft matching (Bolya et al., ICLR 2023, section 3): the r best sources, each into its best target.

    Args:
      metric: `[B, n, D]`, compared by cosine.
      sources: `[na]` or `[B, na]` rows; targets: `[nb]` or `[B, nb]`.
      r: pairs to merge, at most na.
      apart: `[no]` or `[B, no]`, the other rows, which take no part; None: there are none.
      ascending: the sources that stay keep their order; else the most similar comes first.

    Returns:
      A `Matching`; outgoing rows are those apart, the sources that stay, the targets.
    """
    batch, n = metric.shape[:2]
    apart = jnp.zeros((0,), jnp.int32) if apart is None else apart
    sources, targets, apart = (
        jnp.broadcast_to(jnp.asarray(rows), (batch, rows.shape[-1])) for rows in (sources, targets, apart)
    )
    metric = unit(jax.lax.stop_gradient(metric))
    a, b = select.take(metric, sources), select.take(metric, targets)
    similarity = jnp.einsum("bsd,btd->bst", a, b, precision=HIGHEST)
    best, host = similarity.max(axis=-1), similarity.argmax(axis=-1).astype(jnp.int32)
    rank = select.ranks(best)
    stays = rank >= r
    if ascending:
        rank = jnp.where(stays, r + jnp.cumsum(stays, axis=1, dtype=jnp.int32) - 1, rank)
    ordered = jnp.take_along_axis(
        sources, select.inverse(rank, rank.shape[1]), axis=1
    )  # those merged come first
    keep = jnp.concatenate([apart, ordered[:, r:], targets], axis=1)
    left = n - r - targets.shape[1]  # rows ahead of the targets
    of_source = jnp.where(stays, apart.shape[1] + rank - r, left + host)
    remap = select.inverse(keep, n)
    hit = sources[:, :, None] == jnp.arange(n, dtype=jnp.int32)[None, None, :]  # [B, na, n]
    is_source = hit.any(axis=1)
    remap = jnp.where(is_source, jnp.where(hit, of_source[:, :, None], 0).sum(axis=1), remap)
    similarity = jnp.where(is_source, jnp.where(hit, best[:, :, None], 0.0).sum(axis=1), -1.0)
    return Matching(keep, ordered[:, :r], remap, similarity)


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


def into(matching: Matching) -> Array:
    """`[B, r, k]` 0/1: the outgoing row that each merged row goes into."""
    host = jnp.take_along_axis(matching.remap, matching.gone, axis=1)
    return jax.nn.one_hot(host, matching.keep.shape[1], dtype=jnp.float32)
