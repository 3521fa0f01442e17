"""K-medoids: the rows that represent their clusters best go on."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dyntoken.ops import select
from dyntoken.reducers.cluster import Clustering, clustered, distances, nearest
from dyntoken.schema import Natural


class KMedoids(Clustering):
    """K-medoids over the patch rows, weighted by the attention they received in the block before.

    Medoids start at the rows with the largest weights. Each iteration gives every
    row to its nearest medoid, then every cluster the member as medoid that has the
    smallest sum of weighted distances. The medoids' own rows go on unchanged;
    the other rows vanish, and their medoid carries their address.

    Marin et al., WACV 2023 (weighted K-medoids), as a baseline of Haurum et al.
    2023; JoakimHaurum/TokenReduction, `models/kmedoids.py`. That code weighs the
    candidate instead of the members (`w_i * sum_j d_ij`), so that low attention
    makes a medoid, sums over the rows of all clusters, and lets an empty cluster
    fall on row 0.

    Attributes:
      iterations: after the start.
      reference: the new medoids as that code finds them; by default
        `argmin_i sum_j w_j d_ij` over the cluster, an empty one keeps its medoid.
    """

    iterations: Natural = 3
    reference: bool = False

    recalls = ("probs",)

    def reduce(self, tokens, seen, train, *, draws, noise, decision):
        weight = jax.lax.stop_gradient(seen.probs.sum(axis=(1, 2))[:, tokens.prefix :])  # [B, n]
        distance = distances(tokens.patches)
        centres, _ = select.split(weight, self.keep)
        for _ in range(self.iterations):
            centres = self._moved(centres, nearest(distance, centres), distance, weight)
        remap = nearest(distance, centres)
        return clustered(tokens, select.take(tokens.patches, centres), centres, remap, scores=weight)

    def _moved(self, centres: jax.Array, cluster: jax.Array, distance: jax.Array, weight: jax.Array):
        """The medoids `[B, keep]` of the clusters `[B, n]`."""
        member = cluster[:, None, :] == jnp.arange(self.keep)[None, :, None]  # [B, keep, n]
        if self.reference:
            cost = (weight * distance.sum(axis=-1))[:, None, :]
        else:
            weights = jnp.where(member, weight[:, None, :], 0.0)
            cost = jnp.einsum("bkj,bji->bki", weights, distance, precision=select.HIGHEST)
        moved = jnp.where(member, cost, jnp.inf).argmin(axis=-1).astype(jnp.int32)
        return moved if self.reference else jnp.where(member.any(axis=-1), moved, centres)
