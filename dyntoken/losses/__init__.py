"""Losses by name, each a pair (sum, count).

A loss is `fn(output, batch, **options) -> (sum, count)`, both float32 scalars
over the rows (or tokens) that the batch holds; the loss is `sum / count`. Pairs
add up over devices and steps, so a mean never becomes a mean of means. `count`
carries no gradient, so that it can be summed over devices before the backward
pass. Where nothing counts, sum and count are 0 and every gradient is finite.

Of a model with exits (`Output.logits` `[E, B, K]`) a loss may return one sum per
exit, `[E]`, with a common count: the loss is then the sum over the exits of
`weights[e] * sum[e] / count`, by default with all weights 1, as DVT trains
(blackfeather-wang/Dynamic-Vision-Transformer).

`batch` is a dict: `"target"` `[B, K]` soft targets, `"mask"` `[B]` weight of
each row (0 for padding; all ones if absent), for distillation `"teacher"`,
the `Output` of the frozen teacher on the same images, and optionally `"dense"`
`[B, N, K]`, labels of the patches (`token_label`).

A list of losses is written as `(name, options)` pairs, or as a mapping, where
`options` may hold `weight` (default 1) and, of a model with exits, `weights` (one
number per exit). `"ce#small"` is the loss `ce` under
another name, so that one loss can be used twice. To add a loss: one function,
one line in `LOSSES`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dyntoken import schema
from dyntoken.losses import distill
from dyntoken.registry import Table, UnknownNameError, check_call, suggest
from dyntoken.schema import NonNegative
from dyntoken.types import Array, Output

LOSSES = Table(
    "loss",
    {
        "ce": "dyntoken.losses.classify:ce",
        "exit_kl": "dyntoken.losses.distill:exit_kl",
        "keep_ratio": "dyntoken.losses.ratio:keep_ratio",
        "logit_kl": "dyntoken.losses.distill:logit_kl",
        "token_distill": "dyntoken.losses.distill:token_distill",
        "dense_distill": "dyntoken.losses.distill:dense_distill",
        "token_label": "dyntoken.losses.token_label:token_label",
    },
)

NEEDS = ("teacher", "features", "dense")
Specs = Sequence[tuple[str, Mapping[str, Any]]] | Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Spec:
    """One line of a loss list: `key` as logged, `name` as in `LOSSES`, `weights` of the exits."""

    key: str
    name: str
    weight: float
    options: Mapping[str, Any]
    weights: tuple[float, ...] | None = None

    def __call__(self, output: Output, batch: Mapping[str, Any]) -> tuple[Array, Array]:
        """Returns (sum, count) of this loss, unweighted; the sum may be `[exits]`."""
        total, count = LOSSES[self.name](output, batch, **self.options)
        return total.astype(jnp.float32), jax.lax.stop_gradient(count).astype(jnp.float32)

    def over_exits(self, values: Array) -> Array:
        """The weighted sum of one value per exit; a scalar is returned as it is.

        Raises:
          ValueError: if the number of weights is another.
        """
        self.check_weights(len(values) if values.ndim else 0)
        if not values.ndim:
            return values
        return values.sum() if self.weights is None else jnp.dot(jnp.asarray(self.weights), values)

    def check_weights(self, terms: int) -> None:
        """Raises ValueError unless there is one weight for each of `terms` exits (0: a model without)."""
        if self.weights is None or len(self.weights) == terms:
            return
        if not terms:
            raise ValueError(f"loss {self.key!r}: weights is for a model with exits, this one has none")
        which = "each exit but the last" if _mark(self.name) == "earlier" else "each exit"
        raise ValueError(
            f"loss {self.key!r} has {len(self.weights)} weights for {terms} terms: give one for {which}"
        )


def parse(specs: Specs) -> tuple[Spec, ...]:
    """Reads a list of losses and checks every name and option in it.

    Raises:
      UnknownNameError: for an unknown loss or option, naming the nearest.
      ValueError: if two losses have the same key or there is none.
    """
    rows = specs.items() if hasattr(specs, "items") else specs
    parsed: dict[str, Spec] = {}
    for key, given in rows:
        name = key.partition("#")[0]
        options = schema.check(keywords(key), given, owner=f"loss {key!r}")
        if key in parsed:
            raise ValueError(f"loss {key!r} is listed twice: tell them apart as '{name}#a' and '{name}#b'")
        weight, shares = options.pop("weight", 1.0), options.pop("weights", None)
        parsed[key] = Spec(key, name, weight, options, shares)
    if not parsed:
        raise ValueError(f"no loss given: name at least one of {', '.join(LOSSES)}")
    return tuple(parsed.values())


def register_loss(
    name: str,
    fn: Callable[..., tuple[Array, Array]],
    *,
    needs: Sequence[str] = (),
    exits: str | None = None,
) -> None:
    """Adds a loss, a key of `config.losses`.

    Args:
      name: of the loss.
      fn: `fn(output, batch, **options) -> (sum, count)`; its options are keyword-only.
      needs: what it reads besides logits: "teacher", "features", "dense".
      exits: what it makes of a model with exits, see `common.exits`.

    Raises:
      ValueError: a name that is taken, a function of other arguments, or an
        unknown need or mark.
    """
    check_call(f"loss {name!r}", fn, "output", "batch")
    for need in needs:
        if need not in NEEDS:
            raise UnknownNameError(f"loss {name!r}: unknown need {need!r}: {suggest(need, NEEDS)}")
    if exits not in (None, "each", "earlier", "none"):
        raise ValueError(f"loss {name!r}: exits must be 'each', 'earlier', 'none' or None, got {exits!r}")

    @functools.wraps(fn)
    def marked(output: Output, batch: Mapping[str, Any], **options: Any) -> tuple[Array, Array]:
        return fn(output, batch, **options)

    marked.needs, marked.exits = frozenset(needs), exits
    LOSSES.register(name, marked)


def keywords(key: str) -> dict[str, Any]:
    """The options of a line of a loss list: name -> annotation, see `schema`.

    Raises:
      UnknownNameError: no such loss.
    """
    name = key.partition("#")[0]
    own = schema.keywords(LOSSES[name])
    each = {"weights": tuple[NonNegative, ...] | None} if _mark(name) in ("each", "earlier") else {}
    return {"weight": NonNegative, **each, **own}


def _mark(name: str) -> str | None:
    """What a loss makes of exits, see `common.exits`."""
    return getattr(LOSSES[name], "exits", None)


def check(specs: Specs, exits: int) -> None:
    """Refuses losses that do not fit a model before it is built.

    Args:
      specs: the loss list.
      exits: how many the model has; 0 for a model without.

    Raises:
      ValueError: names the loss and what to do.
    """
    for spec in parse(specs):
        mark = _mark(spec.name)
        if mark == "none" and exits:
            raise ValueError(distill.NO_EXITS)
        if mark == "earlier" and exits < 2:
            raise ValueError(distill.TWO_EXITS)
        spec.check_weights(exits - 1 if mark == "earlier" else exits)


def weights(specs: Specs) -> dict[str, float]:
    """The weight of each loss in the total, by key."""
    return {spec.key: spec.weight for spec in parse(specs)}


def needs(specs: Specs) -> frozenset[str]:
    """What the losses want beside logits: a subset of `NEEDS`.

    `"teacher"`: `batch["teacher"]`. `"features"`: `Output.tokens` of student
    and teacher, i.e. `record=("features",)`; `"dense"`: `Output.dense` likewise.
    """
    return frozenset().union(*(getattr(LOSSES[spec.name], "needs", ()) for spec in parse(specs)))


def evaluate(specs: Specs, output: Output, batch: Mapping[str, Any]) -> dict[str, tuple[Array, Array]]:
    """Every loss as an unweighted pair (sum, count) over this batch, by key.

    The sum of a model with exits may be `[exits]`.
    """
    return {spec.key: spec(output, batch) for spec in parse(specs)}


def average(total: Array, count: Array) -> Array:
    """`total / count`, or 0 where nothing was counted."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)


def total(specs: Specs, pairs: Mapping[str, tuple[Array, Array]]) -> Array:
    """The weighted sum of the averages.

    On several devices pass local sums with counts already summed over the
    devices: the shares of all devices then add up to the total of the batch.

    Args:
      specs: the loss list.
      pairs: (sum, count) by key, as `evaluate` returns.

    Returns:
      float32 scalar.
    """
    shares = [spec.weight * spec.over_exits(average(*pairs[spec.key])) for spec in parse(specs)]
    return sum(shares[1:], shares[0])


def metrics(specs: Specs, pairs: Mapping[str, tuple[Array, Array]]) -> dict[str, tuple[Array, Array]]:
    """Pairs to be reported: a loss with one sum per exit becomes two rows.

    `key` is its weighted sum over the exits, so that the total stays the sum of
    weight times row, and `key_per_exit` has the unweighted sums `[exits]`.
    """
    rows = {}
    for spec in parse(specs):
        total, count = pairs[spec.key]
        rows[spec.key] = (spec.over_exits(total), count)
        if total.ndim:
            rows[f"{spec.key}_per_exit"] = (total, count)
    return rows


__all__ = [
    "LOSSES",
    "Spec",
    "Specs",
    "UnknownNameError",
    "average",
    "check",
    "evaluate",
    "keywords",
    "metrics",
    "needs",
    "parse",
    "register_loss",
    "total",
    "weights",
]
