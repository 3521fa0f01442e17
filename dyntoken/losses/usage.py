"""The loss of AdaViT: which share of patches, heads and sub-layers is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dyntoken.losses.common import Pair, loss, row_mask
from dyntoken.schema import NonNegative, Share
from dyntoken.types import Array, Output

Part = Literal["tokens", "heads", "layers"]


@loss()
def usage(
    output: Output,
    batch: Mapping[str, Any],
    *,
    part: Part = "tokens",
    target: Share = 0.5,
    diversity: NonNegative = 0.0,
    entropy: NonNegative = 0.0,
    minimum: NonNegative = 0.0,
    least: Share = 0.1,
) -> Pair:
    """Distance of the share of patches, heads or sub-layers that is used from a target.

    MengLcool/AdaViT. Of tokens `(mean - target)^2 + minimum * sum of max(0, least -
    mean)` over samples and blocks; of heads and layers `|mean - target| + diversity *
    mean |share of each one - target| - entropy * mean entropy` (in nats) of the
    probabilities. Heads count in blocks that run at all, the share of a layer is
    that of its block. Its training script weighs each part by 2 and leaves out
    the others; its class has diversity and entropy 0.1, minimum 1. The share is a
    statistic of the rows at hand: on several devices, of each share of the batch.

    Args:
      output: `state` of a model that chooses (`adavit_...`).
      batch: `"mask"` `[B]`.

    Returns:
      (value times number of rows, number of rows).

    Raises:
      ValueError: for a model that does not choose, or not this part.
    """
    chosen, logits, run = _choices(output, part)
    mask = row_mask(batch, chosen.shape[0])
    count = jnp.sum(mask)
    weight = mask[:, None, None] * (jnp.ones_like(chosen[..., :1]) if run is None else run[..., None])
    weight = jnp.broadcast_to(weight, chosen.shape)
    if part == "tokens":
        share = _mean(chosen, weight)
        short = jnp.maximum(least - chosen.mean(axis=2), 0.0)  # [B, blocks]
        value = jnp.square(share - target) + minimum * jnp.sum(jnp.where(mask[:, None] > 0, short, 0.0))
        return count * value, count
    each = _distance(chosen, weight, target, (0,) if part == "heads" else (0, 2), 1e-6 * (part == "heads"))
    value = _distance(chosen, weight, target, (0, 1, 2)) + diversity * each.mean()
    log_p, log_q = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    bits = -(jnp.exp(log_p) * log_p + jnp.exp(log_q) * log_q)
    value -= entropy * _mean(bits, jnp.broadcast_to(mask[:, None, None], bits.shape))
    return count * value, count


def _choices(output: Output, part: str) -> tuple[Array, Array, Array | None]:
    """What was chosen `[B, blocks, n]`, its logits, and whether a block runs `[B, blocks]` (None: all do)."""
    blocks = [c for c in getattr(output.state, "choices", ()) if getattr(c, part) is not None]
    if not blocks:
        raise ValueError(
            f"loss 'usage' needs a model that chooses its {part}, as adavit_deit_small_patch16_224"
        )
    chosen = jnp.stack([getattr(block, part) for block in blocks], axis=1)
    logits = jnp.stack([getattr(block, f"{part[:-1]}_logits") for block in blocks], axis=1)
    run = None
    if part == "heads" and all(block.layers is not None for block in blocks):
        layers = jnp.stack([block.layers for block in blocks], axis=1)
        run = jax.lax.stop_gradient((layers.max(axis=2) > 0.5).astype(jnp.float32))
    return chosen, logits, run


def _mean(x: Array, weight: Array, axes: tuple[int, ...] = (0, 1, 2)) -> Array:
    """Mean over some axes by weight, where a row of weight 0 may hold anything."""
    total = weight.sum(axis=axes)
    return jnp.sum(jnp.where(weight > 0, x, 0.0), axis=axes) / jnp.where(total > 0, total, 1.0)


def _distance(x: Array, weight: Array, target: float, axes: tuple[int, ...], tie: float = 0.0) -> Array:
    """|mean over some axes - target|, exactly 0 where they meet, with gradient 0 there (`jnp.abs` has 1).

    With `tie` they count as below the target then, which is how the official gradients come out.
    """
    total = weight.sum(axis=axes)
    gap = jnp.sum(jnp.where(weight > 0, x, 0.0), axis=axes) - target * (total + tie)
    return jnp.where(
        total > 0, gap * jax.lax.stop_gradient(jnp.sign(gap)) / jnp.where(total > 0, total, 1.0), 0.0
    )
