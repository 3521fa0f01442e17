"""Losses of A-ViT: the cost of rows that go on, and a prior on the depth at which they halt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dyntoken.losses.common import Pair, loss, row_mask
from dyntoken.schema import Positive
from dyntoken.types import Array, Output


@loss()
def ponder(output: Output, batch: Mapping[str, Any]) -> Pair:
    """The mean ponder cost of a token: its number of blocks, and the rest of its halting scores.

    A-ViT, equation 9; NVlabs/A-ViT weighs it by 0.0005. All tokens count, the
    class token too, and in gather form those that are left.

    Args:
      output: `state` of a model whose rows halt (`avit_...`).
      batch: `"mask"` `[B]`.

    Returns:
      (sum over rows, number of rows).

    Raises:
      ValueError: for a model whose rows do not halt.
    """
    cost = _of_state(output, "ponder", "ponder")
    mask = row_mask(batch, cost.shape[0])
    return jnp.sum(mask * jnp.where(mask > 0, cost.mean(axis=1), 0.0)), jnp.sum(mask)


@loss()
def halting_prior(
    output: Output, batch: Mapping[str, Any], *, center: Positive | None = None, reference: bool = False
) -> Pair:
    """Distance of the mean halting scores over depth from a Gaussian, in nats over the depth.

    A-ViT, equation 11: `KL(prior || scores) / depth`, where the mean score of each
    block is divided by their sum and clamped to [0.01, 0.99]; NVlabs/A-ViT weighs
    it by 0.001. It is a statistic of the rows at hand: on several devices, of
    each share of the batch.

    Args:
      output: `state` of a model whose rows halt (`avit_...`).
      batch: `"mask"` `[B]`.
      center: block (from 0) where the prior of variance 1 lies; by default 8 of 12.
      reference: as the official code computes it. Its mean leaves out sample 0
        where the class token was meant, its prior is scaled by 0.98 / (sum of its
        first `center` values), so that it sums up to more than 1, and what is below 0 is left out.

    Returns:
      (value times number of rows, number of rows).

    Raises:
      ValueError: for a model whose rows do not halt, or for one sample with `reference`.
    """
    scores = jnp.stack([layer.mean(axis=1) for layer in _layers(output, reference)], axis=1)  # [B, depth]
    depth = scores.shape[1]
    mask = row_mask(batch, scores.shape[0])
    count = jnp.sum(mask)
    used = mask
    if reference:
        if scores.shape[0] < 2:
            raise ValueError("halting_prior(reference=True) leaves out sample 0: it needs a batch of two")
        used = mask.at[0].set(0.0)
    scores = jnp.where(used[:, None] > 0, scores, 0.0)
    means = jnp.sum(used[:, None] * scores, axis=0) / jnp.where(used.sum() > 0, used.sum(), 1.0)
    total = means.sum()
    share = jnp.clip(means / jnp.where(total > 0, total, 1.0), 0.01, 0.99)
    middle = 8.0 * depth / 12.0 if center is None else center
    prior = prior_of(depth, middle, reference=reference)
    value = jnp.sum(prior * (jnp.log(prior) - jnp.log(share))) / depth
    return count * (jnp.maximum(value, 0.0) if reference else value), count


def prior_of(depth: int, center: float, *, reference: bool = False) -> Array:
    """The Gaussian prior over blocks `[depth]`, see `halting_prior`."""
    density = [math.exp(-0.5 * (block - center) ** 2) for block in range(depth)]
    if reference:
        scale = 0.98 / sum(density[: int(center)])
    else:
        scale = 1.0 / sum(density)
    return jnp.asarray([scale * value for value in density], jnp.float32)


def _layers(output: Output, reference: bool) -> tuple[Array, ...]:
    scores = _of_state(output, "halting_prior", "scores")
    return scores if reference else tuple(layer[:, output.state.prefix :] for layer in scores)


def _of_state(output: Output, name: str, field: str) -> Any:
    if not hasattr(output.state, field):
        raise ValueError(f"loss {name!r} needs a model whose tokens halt, as avit_deit_small_patch16_224")
    return getattr(output.state, field)
