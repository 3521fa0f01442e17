"""The loss of LTMP: which share of the multiply-adds is left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dyntoken.losses.common import Pair, loss, row_mask
from dyntoken.schema import Share
from dyntoken.types import Array, Output


@loss()
def flops_share(output: Output, batch: Mapping[str, Any], *, target: Share = 0.6) -> Pair:
    """`(share - target)^2` of the multiply-adds that the rows alive need.

    Mxbonn/ltmp, which weighs it by 10. With m the share of rows alive before and
    after a block's reduction, n rows and width d, a block needs `2 m n d^2 + (m n)^2 d
    + 4 m' n d^2` of `6 n d^2 + n^2 d`. A statistic of the rows at hand: on several
    devices, of each share of the batch.

    Args:
      output: `state` of a model with learnt thresholds (`ltmp_...`).
      batch: `"mask"` `[B]`.

    Returns:
      (value times number of rows, number of rows).

    Raises:
      ValueError: for a model without such masks.
    """
    blocks = getattr(output.state, "blocks", ())
    if not blocks or not hasattr(blocks[0], "mask"):
        raise ValueError(
            "loss 'flops_share' needs a model with learnt thresholds, as ltmp_deit_small_patch16_224"
        )
    mask = row_mask(batch, output.logits.shape[0])
    count = jnp.sum(mask)
    means = [_mean(block.mask, mask, count) for block in blocks]
    share = share_of(means, blocks[0].mask.shape[1], output.state.width)
    return count * jnp.square(share - target), count


def share_of(means: list[Array], n: int, d: int) -> Array:
    """The share of multiply-adds left, from that of rows alive after each block's reduction."""
    dense = 6 * n * d**2 + n**2 * d
    ahead = [jnp.ones((), jnp.float32), *means[:-1]]
    parts = [
        (2 * m * n * d**2 + jnp.square(m * n) * d + 4 * after * n * d**2) / dense
        for m, after in zip(ahead, means, strict=True)
    ]
    return sum(parts[1:], parts[0]) / len(parts)


def _mean(alive: Array, mask: Array, count: Array) -> Array:
    """Share of rows alive, over the batch rows that count."""
    rows = jnp.where(mask > 0, alive.mean(axis=1), 0.0)
    return jnp.sum(mask * rows) / jnp.where(count > 0, count, 1.0)
