"""The loss that brings the class token of a network that fuses much to that of one that fuses less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dyntoken.losses.common import Pair, final_tokens, loss, row_mask, teacher_of
from dyntoken.schema import Share
from dyntoken.types import Output


@loss("teacher", "features", exits="none")
def consistency(output: Output, batch: Mapping[str, Any], *, confidence: Share = 0.4) -> Pair:
    """Squared distance of the final class token from the teacher's, where the student is sure enough.

    Lee et al., CVPR 2024, section 3.4 (mlvlab/MCTF, `engine.py`): the teacher is
    the same network with fewer fused tokens (`config.teacher.weights="self"`, or
    `model.clone`); its features are detached here, and its own cross-entropy is
    the loss `teacher_ce`.

    Args:
      output: student, with a class token, recorded with `record=("features",)`.
      batch: `"teacher"` likewise, of the same width; `"target"` `[B, K]`, `"mask"` `[B]`.
      confidence: rows count whose probability of the label is above it; the
        label is every class whose target is above 1 / K, so that both count of a mixed image.

    Returns:
      (sum over rows that count of the mean over channels, their number).

    Raises:
      ValueError: without a teacher, without features, without a class token, or
        for a model with exits.
    """
    teacher = final_tokens(teacher_of(output, batch, "consistency"), "teacher", "consistency")
    student = final_tokens(output, "student", "consistency")
    if not (student.prefix and teacher.prefix):
        raise ValueError("loss 'consistency' compares class tokens, and a model has none")
    target = batch["target"]
    mask = row_mask(batch, target.shape[0])
    probs = jax.nn.softmax(jax.lax.stop_gradient(output.logits).astype(jnp.float32), axis=-1)
    sure = jnp.where(target > 1 / target.shape[-1], probs, 0.0).sum(axis=-1) > confidence
    counts = mask * sure.astype(jnp.float32)
    ours, theirs = (
        jnp.where(counts[:, None] > 0, t.x[:, 0].astype(jnp.float32), 0.0) for t in (student, teacher)
    )
    return jnp.sum(counts * jnp.square(theirs - ours).mean(axis=-1)), jnp.sum(counts)
