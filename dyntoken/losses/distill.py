"""Distillation: from a frozen dense teacher (logits, final tokens) or from the last exit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dyntoken.losses.common import blank, check_unmixed, exits, kl_rows, needs, row_mask, teacher_of
from dyntoken.schema import Positive
from dyntoken.types import Array, Output, Tokens

Variant = Literal["mse", "kl"]
TWO_EXITS = (
    "loss 'exit_kl' needs a model with at least two exits, whose last one teaches: dvt_..., multiexit_..."
)
NO_EXITS = (
    "loss 'token_distill' compares the final tokens of one network, a model with exits has those of "
    "each exit: use logit_kl or exit_kl instead"
)


@needs("teacher")
@exits("each")
def logit_kl(output: Output, batch: Mapping[str, Any]) -> tuple[Array, Array]:
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
    check_unmixed(output, "logit_kl")
    teacher = teacher_of(batch, "logit_kl").logits
    if teacher.shape != output.logits.shape[-2:]:
        raise ValueError(
            f"the teacher's logits have shape {teacher.shape}, the student's {output.logits.shape}: "
            "loss 'logit_kl' needs a teacher with the same classes"
        )
    mask = row_mask(batch, teacher.shape[0])
    aim = blank(teacher, mask)
    stack = output.logits.reshape(-1, *teacher.shape)  # [1 or E, B, K]
    sums = jnp.stack([jnp.sum(mask * kl_rows(blank(one, mask), aim)) for one in stack])
    return (sums if output.logits.ndim == 3 else sums[0]), jnp.sum(mask)


@exits("earlier")
def exit_kl(output: Output, batch: Mapping[str, Any], *, temperature: Positive = 1.0) -> tuple[Array, Array]:
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
    if output.logits.ndim != 3 or len(output.logits) < 2:
        raise ValueError(TWO_EXITS)
    mask = row_mask(batch, output.logits.shape[1])
    *early, last = [blank(one, mask) / temperature for one in output.logits]
    last = jax.lax.stop_gradient(last)
    sums = [temperature**2 * jnp.sum(mask * kl_rows(one, last)) for one in early]
    return jnp.stack(sums), jnp.sum(mask)


@needs("teacher", "features")
@exits("none")
def token_distill(
    output: Output, batch: Mapping[str, Any], *, variant: Variant = "mse"
) -> tuple[Array, Array]:
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
    check_unmixed(output, "token_distill")
    teacher = teacher_of(batch, "token_distill").tokens
    tokens = output.tokens
    if isinstance(tokens, tuple):
        raise ValueError(NO_EXITS)
    _check("token_distill", tokens, teacher)
    if teacher.x.shape[-1] != tokens.x.shape[-1]:
        raise ValueError(
            f"the teacher's tokens have width {teacher.x.shape[-1]}, the student's {tokens.x.shape[-1]}: "
            "loss 'token_distill' needs a teacher of the same width"
        )
    return _distance("token_distill", variant, output, batch, tokens.patches, teacher.patches)


@needs("teacher", "features", "dense")
def dense_distill(
    output: Output, batch: Mapping[str, Any], *, variant: Variant = "kl"
) -> tuple[Array, Array]:
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
    check_unmixed(output, "dense_distill")
    teacher = teacher_of(batch, "dense_distill")
    for who, found in (("student", output), ("teacher", teacher)):
        if found.dense is None:
            raise ValueError(
                f"loss 'dense_distill' needs the {who}'s auxiliary logits: an LV-ViT, applied with "
                "record=('features', 'dense')"
            )
    _check("dense_distill", output.tokens, teacher.tokens)
    if teacher.dense.shape[-1] != output.dense.shape[-1]:
        raise ValueError(
            f"the teacher has {teacher.dense.shape[-1]} classes, the student {output.dense.shape[-1]}: "
            "loss 'dense_distill' needs a teacher with the same classes"
        )
    return _distance("dense_distill", variant, output, batch, output.dense, teacher.dense)


def _distance(
    loss: str, variant: str, output: Output, batch: Mapping[str, Any], student: Array, aim: Array
) -> tuple[Array, Array]:
    """Distance of the student's rows `[B, N, C]` alive from the teacher's `[B, N0, C]` at their places."""
    tokens = output.tokens
    masked = _decision(output)
    alive = (tokens.place >= 0) if masked is None else (masked > 0.5) & (tokens.place >= 0)  # [B, N]
    weight = row_mask(batch, alive.shape[0])[:, None] * jax.lax.stop_gradient(alive).astype(jnp.float32)
    if masked is None or tokens.count != aim.shape[1]:
        aim = jnp.take_along_axis(aim, jnp.maximum(tokens.place, 0)[:, :, None], axis=1)
    student, aim = blank(student, weight), blank(aim, weight)
    if variant == "mse":
        rows = jnp.mean(jnp.square(student - aim), axis=-1)
    else:
        rows = kl_rows(student, aim)
    return jnp.sum(weight * rows), jnp.sum(weight)


def _decision(output: Output) -> Array | None:
    """`[B, N]` aliveness of the final rows, or None if all are (gather form)."""
    tokens = output.tokens
    if tokens.alive is not None:
        return tokens.alive
    if output.reductions:
        last = output.reductions[-1]
        # Gather form keeps exactly `count` rows, mask form all that came in.
        if last.decision.shape[1] == tokens.count and last.count < tokens.count:
            return last.decision
    return None


def _check(loss: str, tokens: Tokens | None, teacher: Tokens | None) -> None:
    for who, found in (("student", tokens), ("teacher", teacher)):
        if found is None:
            raise ValueError(
                f"loss {loss!r} needs the {who}'s final tokens: apply it with record=('features',)"
            )
    if teacher.count != tokens.initial:
        raise ValueError(
            f"the teacher returns {teacher.count} patch tokens but the student starts from {tokens.initial}: "
            f"loss {loss!r} needs a dense teacher with the same patch grid"
        )
