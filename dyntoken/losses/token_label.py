"""Token labelling: every patch token is classified (LV-ViT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dyntoken.losses.common import Pair, cross_entropy, final_tokens, loss, row_mask
from dyntoken.ops import mixing
from dyntoken.types import Output


@loss("dense", "features")
def token_label(output: Output, batch: Mapping[str, Any]) -> Pair:
    """Soft-target cross entropy of the auxiliary logits, one target per patch token, in nats.

    Jiang et al. 2021, "All Tokens Matter", equation 4 (zihangJiang/TokenLabeling,
    `TokenLabelCrossEntropy`); together with `ce` on the class token:
    `{"ce": {"weight": 1.0}, "token_label": {"weight": 0.5}}`.

    A token's target is the dense label of its own cell (`Tokens.place`), of the
    partner image where MixToken took the cell from there. Under a reduction
    method the tokens alive at the end are counted: a dropped patch has no target,
    a host keeps its own cell's whatever it absorbed, and EViT's fused token,
    which stands for no single cell, has none.

    Dense labels: `batch["dense"]` `[B, N0, K]`, soft targets of the cells of the
    first grid, row-major, for the images as the model sees them (cropped and
    flipped with them; without mixup and CutMix). `train.step.train_step`
    hands them on. Without them every token's target is its image's
    `batch["target"]`, as in the official code without label maps. To let a
    network label the tokens while training, make it the teacher and use
    `dense_distill`.

    Args:
      output: applied with `record=("dense", "features")`.
      batch: `"target"` `[B, K]` or `"dense"` `[B, N0, K]`, and `"mask"` `[B]`.

    Returns:
      (sum over tokens, number of tokens).

    Raises:
      ValueError: without auxiliary logits, or if the targets do not fit.
    """
    dense = output.dense
    if dense is None or output.tokens is None:
        raise ValueError(
            "loss 'token_label' needs a model with an auxiliary head (LV-ViT), applied with "
            "record=('dense', 'features')"
        )
    tokens = final_tokens(output, "student", "token_label")
    rows, cells, classes = dense.shape[0], tokens.initial, dense.shape[-1]
    target = batch.get("dense")
    if target is None:
        target = jnp.broadcast_to(batch["target"][:, None], (rows, cells, batch["target"].shape[-1]))
    if target.shape != (rows, cells, classes):
        raise ValueError(
            f"dense labels of shape {target.shape} do not fit {rows} images of {cells} tokens and {classes} "
            "classes: they are [batch, tokens of the first grid, num_classes]"
        )
    target = target.astype(jnp.float32)
    if tokens.mixed is not None:
        target = jnp.where(tokens.mixed[..., None], mixing.partner(target), target)
    alive = tokens.place >= 0
    if tokens.alive is not None:
        alive &= tokens.alive > 0.5
    if tokens.count != cells or tokens.alive is None:
        target = jnp.take_along_axis(target, jnp.maximum(tokens.place, 0)[:, :, None], axis=1)
    weight = row_mask(batch, rows)[:, None] * jax.lax.stop_gradient(alive).astype(jnp.float32)  # [B, N]
    return cross_entropy(dense, target, weight), jnp.sum(weight)
