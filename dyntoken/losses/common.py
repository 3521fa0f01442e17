"""What the losses share: the mask of a batch, its teacher, stated needs, exits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dyntoken.ops import mixing
from dyntoken.types import Array, Output


def needs(*what: str) -> Callable[[Callable], Callable]:
    """Marks a loss that wants a "teacher", "features" or "dense" (`losses.needs`)."""

    def mark(fn: Callable) -> Callable:
        fn.needs = frozenset(what)
        return fn

    return mark


def exits(which: str) -> Callable[[Callable], Callable]:
    """Marks what a loss makes of a model with exits.

    "each": its sum is `[E]`, one per exit. "earlier": it needs exits, and its
    sum is `[E - 1]`, one per exit before the last. "none": it refuses them. A
    loss without a mark has a scalar sum whatever the model.
    """

    def mark(fn: Callable) -> Callable:
        fn.exits = which
        return fn

    return mark


def row_mask(batch: Mapping[str, Any], rows: int) -> Array:
    """`[B]` float32 weight of each row; ones if the batch holds no mask."""
    mask = batch.get("mask")
    if mask is None:
        return jnp.ones((rows,), jnp.float32)
    if mask.shape != (rows,):
        raise ValueError(f"the batch has a mask of shape {mask.shape} but the model returned {rows} rows")
    return jax.lax.stop_gradient(mask.astype(jnp.float32))


def blank(x: Array, weight: Array) -> Array:
    """float32 `x [..., C]` with zeros where `weight [...]` is 0.

    A select, not a product: what padded or dropped rows hold, even a NaN,
    reaches neither the value nor the gradient.
    """
    return jnp.where((weight > 0)[..., None], x.astype(jnp.float32), 0.0)


def teacher_of(batch: Mapping[str, Any], loss: str) -> Output:
    """The teacher's output without gradient, or one clear error."""
    teacher = batch.get("teacher")
    if teacher is None:
        raise ValueError(
            f"loss {loss!r} needs a teacher and the batch has none: set a teacher or drop the loss"
        )
    return jax.lax.stop_gradient(teacher)


def mixed_target(target: Array, mixed: Array | None) -> Array:
    """`target [B, K]`, mixed with the partner row's by the share of cells `mixed [B, N0]`."""
    if mixed is None:
        return target
    share = mixed.astype(target.dtype).mean(axis=1, keepdims=True)
    return (1.0 - share) * target + share * mixing.partner(target)


def check_unmixed(output: Output, loss: str) -> None:
    """Raises ValueError for a student whose tokens MixToken swapped: no teacher saw what it saw."""
    if output.mixed is not None:
        raise ValueError(
            f"loss {loss!r} compares with a teacher that saw the images unmixed: build the model with "
            "mix_token=False"
        )


def kl_rows(student: Array, teacher: Array) -> Array:
    """KL(teacher || student) of the softmaxes over the last axis, in nats."""
    log_p = jax.nn.log_softmax(teacher, axis=-1)
    log_q = jax.nn.log_softmax(student, axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
