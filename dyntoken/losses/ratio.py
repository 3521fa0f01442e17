"""The loss that holds a learnt policy to its keep ratios."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dyntoken.losses.common import Pair, loss, row_mask
from dyntoken.schema import Positive
from dyntoken.types import Output


@loss("decision")
def keep_ratio(
    output: Output, batch: Mapping[str, Any], *, divisor: Positive | None = None, dynamic: bool = False
) -> Pair:
    """Squared distance of the share of kept tokens from its target.

    `sum_s mean_b (mean_n decision_s[b, n] - ratio_s)^2 / divisor` over the
    reduction sites s (raoyongming/DynamicViT, `DistillDiffPruningLoss_dynamic`;
    megvii-research/TPS-CVPR2023, `KeepRatioLoss`). It is for training in mask
    form: in gather form the count is exact, so that the loss is what rounding leaves of it
    and teaches nothing; leave it out there.
    A run whose method learns no decision (`etps`) refuses it.

    Args:
      output: `reductions` of a method that samples its decisions, `decision`
        `[B, n]` with straight-through gradient.
      batch: `"mask"` `[B]`.
      divisor: positive, by default the number of sites (TPS). DynamicViT's own loss
        always divides by 3, however many sites there are.
      dynamic: compare the mean over tokens *and* rows with the target, so that
        images may differ in how much they keep. That is a statistic of the
        rows at hand: on several devices (or with `config.accumulate`), of each
        share of the batch, and then the only loss that depends on their number.

    Returns:
      (sum over rows, number of rows).

    Raises:
      ValueError: if the model reduces nothing.
    """
    sites = output.reductions
    if not sites:
        raise ValueError(
            "loss 'keep_ratio' needs a model that reduces tokens: this one has no reduction site"
        )
    mask = row_mask(batch, sites[0].decision.shape[0])
    count = jnp.sum(mask)
    total = jnp.zeros((), jnp.float32)
    for site in sites:
        patches = site.decision[:, : site.grid[0] * site.grid[1] or None]  # rows added later come after
        share = jnp.mean(patches.astype(jnp.float32), axis=-1)  # [B]
        share = jnp.where(mask > 0, share, site.ratio)
        if dynamic:
            share = jnp.sum(mask * share) / jnp.where(count > 0, count, 1.0)
            total += count * jnp.square(share - site.ratio)
        else:
            total += jnp.sum(mask * jnp.square(share - site.ratio))
    return total / (divisor or len(sites)), count
