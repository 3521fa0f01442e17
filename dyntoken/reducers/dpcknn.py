"""DPC-KNN: density peaks as centres, each cluster its members' weighted mean."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.ops import select
from dyntoken.reducers.cluster import Clustering, clustered, distances, nearest
from dyntoken.schema import Count

NOISE = 1e-6
EPS = 1e-6


class DPCKNN(Clustering):
    """Clustering by density peaks (Du et al. 2016) as TCFormer (CVPR 2022, section 3.2) merges tokens.

    Density is exp of minus the mean squared distance (over sqrt(C)) of the
    nearest neighbours, the row itself among them; centres are the rows with the
    largest product of density and distance to the next denser row. Every row goes
    to its nearest centre, and the new row is their mean, weighted by exp of a
    learnt score. No gradient passes through the choice.

    JoakimHaurum/TokenReduction, `models/dpcknn.py`. It adds uniform noise to the
    densities, also in evaluation, so that none are equal; here the first of equal
    rows counts as denser and nothing is random. `noise [B, n]` gives its draws.

    Attributes:
      k_neighbors: rows that a density counts, at most all.
      equal_weight: plain means, without a learnt score.
    """

    k_neighbors: Count = 5
    equal_weight: bool = False

    @nn.compact
    def reduce(self, tokens, seen, train, *, draws, noise, decision):
        x = tokens.patches.astype(jnp.float32)
        weight = jnp.ones(x.shape[:2])
        if not self.equal_weight:
            weight = jnp.exp(layers.dense(1, name="score")(x))[..., 0]
        distance = distances(x) / x.shape[-1] ** 0.5
        near = -jax.lax.top_k(-distance, min(self.k_neighbors, x.shape[1]))[0]
        density = jnp.exp(-jnp.square(near).mean(axis=-1))
        if noise is not None:
            chex.assert_shape(noise, density.shape)
            density = density + NOISE * noise
        rows = jnp.arange(x.shape[1])
        denser = density[:, None, :] > density[:, :, None]
        denser |= (density[:, None, :] == density[:, :, None]) & (rows[None, :] < rows[:, None])[None]
        largest = distance.max(axis=(1, 2))[:, None, None]
        score = density * jnp.where(denser, distance, largest).min(axis=-1)
        centres, _ = select.split(score, self.keep)
        own = select.inverse(centres, x.shape[1])
        remap = jnp.where(own >= 0, own, nearest(distance, centres))
        member = jax.nn.one_hot(remap, self.keep, axis=1) * weight[:, None, :]  # [B, keep, n]
        total = member.sum(axis=-1, keepdims=True) + EPS
        merged = jnp.einsum("bkn,bnc->bkc", member / total, x, precision=select.HIGHEST)
        return clustered(tokens, merged, centres, remap, scores=score)
