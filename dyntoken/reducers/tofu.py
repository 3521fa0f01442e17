"""ToFu: similar rows are dropped in early blocks and merged in late ones, with their norm kept."""

from __future__ import annotations

import math

import jax.numpy as jnp

from dyntoken.ops import merge, select
from dyntoken.reducers.merging import Merged, Merging, unchanged
from dyntoken.schema import Keep, Share
from dyntoken.types import Tokens


class ToFu(Merging):
    """Token fusion (Kim et al., "Bridging the Gap between Token Pruning and Token Merging", WACV 2024).

    Its authors published no code; this follows the one in hchautran/PiToMe. At
    every block, between attention and MLP, rows are matched as in `ToMe`. Up to
    block depth // 2 the sources of the r best pairs are dropped ("pruned merging");
    their patches are carried by the target all the same, which stands for them.
    In later blocks (section 3.3, MLERP) a pair becomes its mean, scaled to
    the largest norm of the group. Without parameters, as `ToMe`.

    Attributes (besides those of `Reducer`):
      rate: share of the rows (the prefix counted) that each block keeps, counted
        as the code does, in place of `keep`.
      reference: as that code: what scales the mean is the largest norm over
        the target's old norm, not over the mean's own, so that the norm is not kept.
    """

    rate: Share | None = None
    reference: bool = False

    needs = ("keys",)

    def site_keep(self, keep: Keep, sites: int, patches: int, prefix: int) -> Keep:
        """With `rate`, counts per site; it overrules `keep`."""
        if self.rate is None:
            return super().site_keep(keep, sites, patches, prefix)
        counts = []
        for _ in range(sites):
            rows = patches + prefix
            patches -= math.floor(rows - rows * self.rate)
            counts.append(patches)
        return tuple(counts)

    def merge(self, tokens: Tokens, seen, train: bool) -> Merged:
        if tokens.count == self.keep:
            return unchanged(tokens)
        matching = self.by_keys(tokens, seen)
        if self.block <= self.depth // 2:
            x = select.take(tokens.patches, matching.keep)
        else:
            x = self._scaled_mean(tokens.patches, matching)
        return Merged(x, matching.keep, matching.remap, -matching.similarity)

    def _scaled_mean(self, x: jnp.ndarray, matching: merge.Matching) -> jnp.ndarray:
        norm = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)  # [B, n]
        old, merged = (jnp.take_along_axis(norm, rows, axis=1) for rows in (matching.keep, matching.gone))
        at = merge.into(matching)
        largest = jnp.maximum(old, jnp.where(at > 0, merged[..., None], 0.0).max(axis=1))
        mean = merge.mean(x, matching).astype(jnp.float32)
        own = old if self.reference else jnp.linalg.norm(mean, axis=-1)
        changed = at.any(axis=1)
        scale = jnp.where(changed, largest / jnp.where(own > 0, own, 1.0), 1.0)
        return (mean * scale[..., None]).astype(x.dtype)
