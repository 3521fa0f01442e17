"""PiToMe: rows of high energy, that is, in dense clusters, are merged; the others are protected."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dyntoken.ops import merge, select
from dyntoken.reducers.merging import Merged, Merging, unchanged
from dyntoken.schema import Keep, Share
from dyntoken.types import Tokens

MARGIN = 0.75  # section 3.2; falls to 0 over the blocks


class PiToMe(Merging):
    """Protect informative tokens before merging (Tran et al., NeurIPS 2024; hchautran/PiToMe).

    Section 3: at every block, between attention and MLP, a row's energy is the
    mean over all rows of `elu(cosine - margin)` of the keys, averaged over
    heads. Of the 2r rows of highest energy every second one goes into its most
    similar one of the others, as a mean weighted by `Tokens.size`. The
    prefix takes no part. Without parameters, as `ToMe`.

    Attributes (besides those of `Reducer`):
      rate: share of the patches that each block keeps, counted as the code does,
        in place of `keep`; at least 0.5.
      reference: as the code for image classification: in the first half of the
        blocks all rows take part, in the order of their energy, and the r most
        similar pairs merge; and attention does not count rows by size.
    """

    rate: Share | None = None
    reference: bool = False

    needs = ("keys",)
    proportional = property(lambda self: not self.reference)

    def site_keep(self, keep: Keep, sites: int, patches: int, prefix: int) -> Keep:
        """With `rate`, counts per site; it overrules `keep`."""
        if self.rate is None:
            return super().site_keep(keep, sites, patches, prefix)
        counts = []
        for _ in range(sites):
            patches -= math.floor(patches - patches * self.rate)
            counts.append(patches)
        return tuple(counts)

    def merge(self, tokens: Tokens, seen, train: bool) -> Merged:
        n, r = tokens.count, tokens.count - self.keep
        self.check_pairs(n, n // 2)
        if r == 0:
            return unchanged(tokens)
        metric = seen["keys"][:, :, tokens.prefix :].astype(jnp.float32).mean(axis=1)
        score = energy(metric, MARGIN - MARGIN * self.block / self.depth)
        order = select.order(score)  # [B, n], highest first
        if self.reference and self.block < math.ceil(self.depth / 2):
            matching = merge.bipartite(metric, order[:, ::2], order[:, 1::2], r, ascending=False)
        else:
            high, low = order[:, : 2 * r], order[:, 2 * r :]
            matching = merge.bipartite(metric, high[:, ::2], high[:, 1::2], r, apart=low)
        x = merge.mean(tokens.patches, matching, tokens.size)
        return Merged(x, matching.keep, matching.remap, -score)


def energy(metric: jax.Array, margin: float) -> jax.Array:
    """`[B, n]` float32 of rows `metric [B, n, D]`: mean over all rows of `elu(cosine - margin)`."""
    rows = merge.unit(jax.lax.stop_gradient(metric))
    cosine = jnp.einsum("bnd,bmd->bnm", rows, rows, precision=merge.HIGHEST)
    return jax.nn.elu(cosine - margin).mean(axis=-1)
