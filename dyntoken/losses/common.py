"""What the losses share: what a loss declares, the mask of a batch, its teacher, KL."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dyntoken.types import Array, Output, Tokens

Pair = tuple[Array, Array]  # (sum, count)
NEEDS = ("teacher", "features", "dense", "decision")
EXITS = ("each", "earlier", "none", None)


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss and what it declares.

    Attributes:
      fn: `(output, batch, **options) -> (sum, count)`.
      needs: what it reads besides logits, of `NEEDS`. "decision": one that the method learns (`Reducer.learns`).
      exits: what it makes of a model with exits. "each": its sum is `[E]`, one per
        exit. "earlier": it needs exits, and its sum is `[E - 1]`, one per exit
        before the last. "none": it refuses them. None: its sum is a scalar
        whatever the model.
    """

    fn: Callable[..., Pair]
    needs: frozenset[str] = frozenset()
    exits: str | None = None

    def __call__(self, output: Output, batch: Mapping[str, Any], **options: Any) -> Pair:
        return self.fn(output, batch, **options)


def loss(*needs: str, exits: str | None = None) -> Callable[[Callable[..., Pair]], Loss]:
    """Decorator: the function as a `Loss`."""
    return lambda fn: Loss(fn, frozenset(needs), exits)


def check_exits(name: str, mark: str | None, exits: int) -> None:
    """Raises ValueError if a loss with this mark does not fit a model with so many exits (0: without)."""
    if mark == "none" and exits:
        raise _not_of_exits(name)
    if mark == "earlier" and exits < 2:
        raise ValueError(
            f"loss {name!r} needs a model with at least two exits, whose last one teaches: dvt_..., "
            "multiexit_..."
        )


def _not_of_exits(name: str) -> ValueError:
    return ValueError(
        f"loss {name!r} compares the final tokens of one network, a model with exits has those of each exit: "
        "use logit_kl or exit_kl instead"
    )


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


def cross_entropy(logits: Array, target: Array, weight: Array) -> Array:
    """`-sum_k target_k log softmax(logits)_k` in nats, summed over rows with `weight [...]`."""
    rows = -jnp.sum(target * jax.nn.log_softmax(blank(logits, weight), axis=-1), axis=-1)
    return jnp.sum(weight * rows)


def kl_rows(student: Array, teacher: Array) -> Array:
    """KL(teacher || student) of the softmaxes over the last axis, in nats."""
    log_p = jax.nn.log_softmax(teacher, axis=-1)
    log_q = jax.nn.log_softmax(student, axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def teacher_of(output: Output, batch: Mapping[str, Any], name: str) -> Output:
    """The teacher's output without gradient; raises ValueError if there is none or it saw other images."""
    if output.mixed is not None:
        raise ValueError(
            f"loss {name!r} compares with a teacher that saw the images unmixed: build the model with "
            "mix_token=False"
        )
    teacher = batch.get("teacher")
    if teacher is None:
        raise ValueError(
            f"loss {name!r} needs a teacher and the batch has none: set a teacher or drop the loss"
        )
    return jax.lax.stop_gradient(teacher)


def final_tokens(output: Output, who: str, name: str) -> Tokens:
    """The tokens after the last block; raises ValueError if they were not recorded, or are those of exits."""
    if output.tokens is None:
        raise ValueError(f"loss {name!r} needs the {who}'s final tokens: apply it with record=('features',)")
    if isinstance(output.tokens, tuple):
        raise _not_of_exits(name)
    return output.tokens
