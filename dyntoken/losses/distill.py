"""Distillation: from a dense teacher (logits, final tokens) or from the last exit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dyntoken.losses.common import (
    Pair,
    blank,
    check_exits,
    final_tokens,
    kl_rows,
    loss,
    row_mask,
    teacher_of,
)
from dyntoken.schema import Positive
from dyntoken.types import Array, Output, Tokens

Variant = Literal["mse", "kl"]


@loss("teacher", exits="each")
def logit_kl(output: Output, batch: Mapping[str, Any]) -> Pair:
    """KL(teacher || student) of the class distributions, in nats.

    Temperature 1, mean over the batch (raoyongming/DynamicViT,
    `DistillDiffPruningLoss_dynamic`; megvii-research/TPS-CVPR2023,
    `DistillKLLoss`). In a model with exits every exit learns from the same
    teacher.

    Args:
      output: `logits` `[B, K]`, or `[E, B, K]` of a model with exits.
      batch: `"teacher"` with logits `[B, K]`, `"mask"` `[B]`.

    Returns:
      (sum over rows, number of rows); the sum of a model with exits is `[E]`.

    Raises:
      ValueError: without a teacher, or if its classes are others.
    """
    teacher = teacher_of(output, batch, "logit_kl").logits
    if teacher.shape != output.logits.shape[-2:]:
        raise ValueError(
            f"the teacher's logits have shape {teacher.shape}, the student's {output.logits.shape}: "
            "loss 'logit_kl' needs a teacher with the same classes"
        )
    mask = row_mask(batch, teacher.shape[0])
    aim = blank(teacher, mask)
    stack = output.logits.reshape(-1, *teacher.shape)  # [1 or E, B, K]
    sums = jnp.stack([jnp.sum(mask * kl_rows(blank(logits, mask), aim)) for logits in stack])
    return (sums if output.logits.ndim == 3 else sums[0]), jnp.sum(mask)


@loss(exits="earlier")
def exit_kl(output: Output, batch: Mapping[str, Any], *, temperature: Positive = 1.0) -> Pair:
    """KL(last exit || earlier exit) of the class distributions, in nats.

    The last exit of a model teaches the earlier ones: it is detached, so no
    gradient reaches it through this loss. With a temperature T both
    distributions are softened and the result is multiplied by T squared, which
    keeps the size of its gradient (Hinton et al. 2015, section 2).

    Args:
      output: `logits` `[E, B, K]`, E at least 2.
      batch: `"mask"` `[B]`.
      temperature: positive.

    Returns:
      (sums over rows `[E - 1]`, number of rows).

    Raises:
      ValueError: for a model without exits.
    """
    check_exits("exit_kl", "earlier", len(output.logits) if output.logits.ndim == 3 else 0)
    mask = row_mask(batch, output.logits.shape[1])
    *early, last = [blank(logits, mask) / temperature for logits in output.logits]
    last = jax.lax.stop_gradient(last)
    sums = [temperature**2 * jnp.sum(mask * kl_rows(logits, last)) for logits in early]
    return jnp.stack(sums), jnp.sum(mask)


@loss("teacher", "features", exits="none")
def token_distill(output: Output, batch: Mapping[str, Any], *, variant: Variant = "mse") -> Pair:
    """Distance of the surviving tokens from the teacher's at the same place.

    Counts the tokens alive after the last site. In mask form rows keep their
    place; in gather form each row is compared with the teacher's patch at
    `tokens.place`, and rows that stand for no single patch (EViT's fused token)
    are left out. Swin and ConvNeXt keep every cell, so there it is the whole
    feature map (`ConvNextDistillDiffPruningLoss`).

    Args:
      output: student, recorded with `record=("features",)`.
      batch: `"teacher"` likewise, dense, of the same width; `"mask"` `[B]`.
      variant: `"mse"`, mean over channels (DynamicViT), or `"kl"`,
        KL(teacher || student) of the softmaxes over channels (TPS).

    Returns:
      (sum over tokens, number of tokens).

    Raises:
      ValueError: without a teacher, without features, if they do not fit, or
        for a model with exits.
    """
    tokens, teacher = _both_tokens("token_distill", output, teacher_of(output, batch, "token_distill"))
    if teacher.x.shape[-1] != tokens.x.shape[-1]:
        raise ValueError(
            f"the teacher's tokens have width {teacher.x.shape[-1]}, the student's {tokens.x.shape[-1]}: "
            "loss 'token_distill' needs a teacher of the same width"
        )
    return _distance(variant, output, tokens, batch, tokens.patches, teacher.patches)


@loss("teacher", "features", "dense")
def dense_distill(output: Output, batch: Mapping[str, Any], *, variant: Variant = "kl") -> Pair:
    """Distance of the surviving tokens' auxiliary logits from the teacher's at the same place.

    What DynamicViT trains LV-ViT with in place of `token_distill`
    (raoyongming/DynamicViT, `DistillDiffPruningLoss_dynamic` on `dylvvit`): the
    rows are those that `token_distill` compares, the widths may differ. With a
    dense student it is token labelling by the teacher.

    Args:
      output: student with an auxiliary head, recorded with
        `record=("features", "dense")`.
      batch: `"teacher"` likewise, dense; `"mask"` `[B]`.
      variant: `"kl"`, KL(teacher || student) of the class distributions in nats
        (official), or `"mse"`, mean over classes.

    Returns:
      (sum over tokens, number of tokens).

    Raises:
      ValueError: without a teacher or auxiliary logits, or if they do not fit.
    """
    teacher = teacher_of(output, batch, "dense_distill")
    dense, aim = (_dense(found, who) for found, who in ((output, "student"), (teacher, "teacher")))
    tokens, _ = _both_tokens("dense_distill", output, teacher)
    if aim.shape[-1] != dense.shape[-1]:
        raise ValueError(
            f"the teacher has {aim.shape[-1]} classes, the student {dense.shape[-1]}: "
            "loss 'dense_distill' needs a teacher with the same classes"
        )
    return _distance(variant, output, tokens, batch, dense, aim)


def _dense(output: Output, who: str) -> Array:
    if output.dense is None:
        raise ValueError(
            f"loss 'dense_distill' needs the {who}'s auxiliary logits: an LV-ViT, applied with "
            "record=('features', 'dense')"
        )
    return output.dense


def _both_tokens(name: str, output: Output, teacher: Output) -> tuple[Tokens, Tokens]:
    """The final tokens of student and teacher; raises ValueError unless the teacher has every patch."""
    tokens, aim = final_tokens(output, "student", name), final_tokens(teacher, "teacher", name)
    if aim.count != tokens.initial:
        raise ValueError(
            f"the teacher returns {aim.count} patch tokens but the student starts from {tokens.initial}: "
            f"loss {name!r} needs a dense teacher with the same patch grid"
        )
    return tokens, aim


def _distance(
    variant: str, output: Output, tokens: Tokens, batch: Mapping[str, Any], student: Array, aim: Array
) -> Pair:
    """Distance of the student's rows `[B, N, C]` alive from the teacher's `[B, N0, C]` at their places."""
    masked = _decision(output, tokens)
    alive = tokens.place >= 0  # [B, N]
    if masked is not None:
        alive &= masked > 0.5
    weight = row_mask(batch, alive.shape[0])[:, None] * jax.lax.stop_gradient(alive).astype(jnp.float32)
    if masked is None or tokens.count != aim.shape[1]:
        aim = jnp.take_along_axis(aim, jnp.maximum(tokens.place, 0)[:, :, None], axis=1)
    student, aim = blank(student, weight), blank(aim, weight)
    rows = jnp.mean(jnp.square(student - aim), axis=-1) if variant == "mse" else kl_rows(student, aim)
    return jnp.sum(weight * rows), jnp.sum(weight)


def _decision(output: Output, tokens: Tokens) -> Array | None:
    """`[B, N]` aliveness of the final rows, or None if all are (gather form)."""
    if tokens.alive is None and output.reductions:
        last = output.reductions[-1]
        # Gather form keeps exactly `count` rows, mask form all that came in.
        if last.decision.shape[1] == tokens.count and last.count < tokens.count:
            return last.decision
    return tokens.alive
