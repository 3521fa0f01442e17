"""Cross entropy with soft targets, of one classifier or of every exit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dyntoken.losses.common import Pair, cross_entropy, loss, row_mask
from dyntoken.ops import mixing
from dyntoken.types import Output


@loss(exits="each")
def ce(output: Output, batch: Mapping[str, Any]) -> Pair:
    """Soft-target cross entropy in nats, `-sum_k target_k log softmax(logits)_k`.

    A distilled model pays the mean of the losses of its two heads (not the
    loss of the mean logits), as DeiT trains it (facebookresearch/deit). Where
    MixToken swapped tokens, the target is mixed with that of the partner row by
    their share (zihangJiang/TokenLabeling).

    Args:
      output: `logits` `[B, K]`, or `heads` `[2, B, K]`; of a model with exits
        `logits` `[E, B, K]`.
      batch: `"target"` `[B, K]` and `"mask"` `[B]`.

    Returns:
      (sum over rows, number of rows); the sum of a model with exits is `[E]`.

    Raises:
      ValueError: if the targets do not fit the logits.
    """
    target = batch["target"].astype(jnp.float32)
    if target.shape != output.logits.shape[-2:]:
        raise ValueError(
            f"targets of shape {target.shape} do not fit logits of shape {output.logits.shape}: "
            "soft targets are [batch, num_classes]"
        )
    if output.mixed is not None:  # [B, N0]
        share = output.mixed.astype(target.dtype).mean(axis=1, keepdims=True)
        target = (1.0 - share) * target + share * mixing.partner(target)
    mask = row_mask(batch, target.shape[0])
    logits = output.logits if output.heads is None else output.heads
    stack = logits.reshape(-1, *target.shape)  # [S, B, K]: one classifier, two heads or all exits
    sums = jnp.stack([cross_entropy(each, target, mask) for each in stack])  # [S]
    return (sums if output.logits.ndim == 3 else jnp.mean(sums)), jnp.sum(mask)


@loss("teacher", exits="none")
def teacher_ce(output: Output, batch: Mapping[str, Any]) -> Pair:
    """`ce` of the teacher's output, by which a teacher that shares the student's weights learns.

    Lee et al., CVPR 2024, section 3.4 (mlvlab/MCTF). Of a frozen teacher it is a constant.

    Args:
      output: of the student, not read.
      batch: as of `ce`, and `"teacher"`.

    Returns:
      (sum over rows, number of rows).

    Raises:
      ValueError: without a teacher, or targets that do not fit its logits.
    """
    if batch.get("teacher") is None:
        raise ValueError("loss 'teacher_ce' needs a teacher and the batch has none: set a teacher or drop it")
    return ce(batch["teacher"], batch)
