"""What becomes of dropped tokens: drop, one token, mean of the host, squeeze.

One rule serves both forms. `targets [B, T, C]` are rows that may absorb,
`sources [B, S, C]` rows to be absorbed. In the gather form they are the kept
and the dropped rows; in the mask form both are all rows, `allowed` says who may
be a host and `weight` who is dropped here (its straight-through gradient is
what reaches the predictor).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
HIGHEST = jax.lax.Precision.HIGHEST
NORM_EPS = 1e-6  # megvii-research/TPS-CVPR2023: x / (|x| + 1e-6)
MASKED = -100.0  # its value for a pair that may not match


class Fused(NamedTuple):
    """Result of a fusing rule.

    Attributes:
      x: `[B, T, C]` targets after absorbing.
      extra: `[B, 1, C]` one more row, or None.
      host: `[B, S]` int32 target of each source, or None if the rule has no
        hosts. Defined for every source; the caller knows which were dropped.
    """

    x: Array
    extra: Array | None = None
    host: Array | None = None


def cosine(a: Array, b: Array) -> Array:
    """Cosine similarity of all pairs: `[B, S, C]`, `[B, T, C]` -> `[B, S, T]` float32."""
    a, b = (_unit(t.astype(jnp.float32)) for t in (a, b))
    return jnp.einsum("bsc,btc->bst", a, b, precision=HIGHEST)


def _unit(x: Array) -> Array:
    # The inner guard keeps the gradient of an all-zero row finite; the value is the reference's.
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (norm + NORM_EPS)


def dot(a: Array, b: Array) -> Array:
    """Inner product of all pairs, float32."""
    pair = (a.astype(jnp.float32), b.astype(jnp.float32))
    return jnp.einsum("bsc,btc->bst", *pair, precision=HIGHEST)


def l2(a: Array, b: Array) -> Array:
    """Minus the root mean square difference of all pairs, over channels: as near as by L2, of the size of 1."""
    ours, theirs = (jnp.square(x.astype(jnp.float32)).mean(axis=-1) for x in (a, b))
    square = ours[:, :, None] + theirs[:, None, :] - 2.0 * dot(a, b) / a.shape[-1]
    return -jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


# By which a host is chosen. Of a random one the similarity is its cosine.
MEASURES = {"cosine": cosine, "dot": dot, "l2": l2, "random": cosine}
LARGEST = {"dot": 60.0}  # of similarities that have no bound: exp of more than 88 is infinite


def match(
    targets: Array,
    sources: Array,
    *,
    allowed: Array | None = None,
    same: bool = False,
    temperature: float = 1.0,
    measure: str = "cosine",
    compared: tuple[Array, Array] | None = None,
    luck: Array | None = None,
) -> tuple[Array, Array]:
    """The most similar allowed target of each source (TPS, section 3.2).

    Args:
      targets: `[B, T, C]`; sources: `[B, S, C]`.
      allowed: `[B, T]`, > 0.5 for rows that may be a host; None allows all.
      same: sources and targets are the same rows, so none matches itself.
      temperature: divides the similarity.
      measure: row of `MEASURES`.
      compared: `[B, T, D]`, `[B, S, D]` features of targets and sources that are compared in place of the rows.
      luck: `[B, S, T]`, random numbers; with "random" the allowed target of the largest is the host.

    Returns:
      `(host [B, S] int32, similarity [B, S] float32)`. Of equally similar
      targets the first one is the host (the reference counts the source in each
      of them).
    """
    hosts, guests = (targets, sources) if compared is None else compared
    sim = MEASURES[measure](guests, hosts)
    sim = sim / temperature
    rank = jax.lax.stop_gradient(sim if luck is None else luck)
    may = ~jnp.eye(sim.shape[-1], dtype=bool)[None] if same else None
    if allowed is not None:
        able = allowed[:, None, :] > 0.5
        may = able if may is None else may & able
    if may is not None:  # what may be no host loses to any similarity, also to one below MASKED
        sim, rank = jnp.where(may, sim, MASKED), jnp.where(may, rank, -jnp.inf)
    host = rank.argmax(axis=-1).astype(jnp.int32)
    # A select rather than a gather: the gather's gradient is a scatter, serial on a CPU.
    chosen = host[..., None] == jnp.arange(sim.shape[-1])[None, None, :]
    return host, jnp.where(chosen, sim, 0.0).sum(axis=-1)


def _absorb(targets: Array, sources: Array, host: Array, weight: Array, own: float | Array) -> Array:
    """Weighted mean of each target (weight `own`, or `[B, T]` of them) and its sources, one product."""
    at = jax.nn.one_hot(host, targets.shape[1], dtype=jnp.float32)  # [B, S, T], and no gradient
    weight = weight.astype(jnp.float32)[..., None]
    mine = own if isinstance(own, float) else own[..., None]
    heavy = weight * sources.astype(jnp.float32)
    total = mine * targets.astype(jnp.float32) + jnp.einsum("bst,bsc->btc", at, heavy, precision=HIGHEST)
    share = mine + (at * weight).sum(axis=1)[..., None]
    if not isinstance(own, float):  # a row long dead may weigh nothing: it stays as it is
        total, share = jnp.where(share > 0, total, targets), jnp.where(share > 0, share, 1.0)
    return (total / share).astype(targets.dtype)


def drop(targets: Array, sources: Array, **_: object) -> Fused:
    """Dropped rows leave no trace (DynamicViT)."""
    return Fused(targets)


def one_token(
    targets: Array, sources: Array, *, importance: Array, weight: Array | None = None, **_: object
) -> Fused:
    """Dropped rows become one more row, weighted by importance (EViT, section 3.3).

    The weights are not renormalised, as in the reference.
    """
    share = importance.astype(jnp.float32)
    share = share if weight is None else share * weight
    extra = (share[..., None] * sources.astype(jnp.float32)).sum(axis=1, keepdims=True)
    return Fused(targets, extra=extra.astype(targets.dtype))


def package_sum(
    targets: Array, sources: Array, *, importance: Array, weight: Array | None = None, **_: object
) -> Fused:
    """SPViT's package token as its code has it: a sum, whose length grows with the number of rows in it."""
    return one_token(targets, sources, importance=importance, weight=weight)


def package(
    targets: Array, sources: Array, *, importance: Array, weight: Array | None = None, **_: object
) -> Fused:
    """SPViT's package token (section 3.3): the mean of the dropped rows, weighted by importance."""
    share = importance if weight is None else importance * weight
    total = share.sum(axis=1, keepdims=True)
    share = importance / jnp.where(total > 0, total, 1.0)
    return one_token(targets, sources, importance=share, weight=weight)


def mean(
    targets: Array,
    sources: Array,
    *,
    allowed: Array | None = None,
    weight: Array | None = None,
    same: bool = False,
    measure: str = "cosine",
    compared: tuple[Array, Array] | None = None,
    luck: Array | None = None,
    **_: object,
) -> Fused:
    """Each host becomes the plain mean of itself and the rows it absorbs."""
    by = {"measure": measure, "compared": compared, "luck": luck}
    host, _similarity = match(targets, sources, allowed=allowed, same=same, **by)
    weight = jnp.ones(host.shape, jnp.float32) if weight is None else weight
    if allowed is not None:  # a sample that drops every row has no host
        weight = weight * (allowed > 0.5).any(axis=1, keepdims=True)
    return Fused(_absorb(targets, sources, host, weight, 1.0), host=host)


def squeeze(
    targets: Array,
    sources: Array,
    *,
    allowed: Array | None = None,
    weight: Array | None = None,
    same: bool = False,
    temperature: float = 1.0,
    measure: str = "cosine",
    compared: tuple[Array, Array] | None = None,
    luck: Array | None = None,
    mass: tuple[float | Array, Array] | None = None,
    **_: object,
) -> Fused:
    """Each dropped row is squeezed into its most similar kept row (TPS, section 3.2).

    `y = (e * x + sum exp(s) * x_dropped) / (e + sum exp(s))` with s the
    similarity over the temperature: one argmax and one one-hot product,
    O(S * T), no loop. With no host allowed a row stays as it is.

    Args:
      measure, compared, luck: see `match`.
      mass: `[B, T]` (or a number) and `[B, S]` positive weights of targets and sources in
        that mean, in place of e and exp(s).
    """
    by = {"measure": measure, "compared": compared, "luck": luck}
    host, similarity = match(targets, sources, allowed=allowed, same=same, temperature=temperature, **by)
    similarity = jnp.minimum(similarity, LARGEST[measure]) if measure in LARGEST else similarity
    if mass is not None:
        own, share = mass
        share = share if weight is None else share * weight
        if allowed is not None:  # a sample that drops every row has no host
            share = share * (allowed > 0.5).any(axis=1, keepdims=True)
        return Fused(_absorb(targets, sources, host, share, own), host=host)
    if weight is None:
        share = jnp.exp(similarity)
    else:  # the reference multiplies inside and outside: same value, another gradient of the decision
        share = jnp.exp(similarity * weight) * weight
    return Fused(_absorb(targets, sources, host, share, math.e), host=host)
