"""A list of losses, read once: checked against the model, evaluated, weighed, reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dyntoken import schema
from dyntoken.losses.common import EXITS, NEEDS, Loss, Pair, check_exits
from dyntoken.registry import Table, UnknownNameError, check_call, suggest
from dyntoken.schema import NonNegative
from dyntoken.types import Array, Output

LOSSES = Table(
    "loss",
    {
        "ce": "dyntoken.losses.classify:ce",
        "teacher_ce": "dyntoken.losses.classify:teacher_ce",
        "ponder": "dyntoken.losses.halting:ponder",
        "halting_prior": "dyntoken.losses.halting:halting_prior",
        "multiply_adds": "dyntoken.losses.budget:multiply_adds",
        "consistency": "dyntoken.losses.consistency:consistency",
        "exit_kl": "dyntoken.losses.distill:exit_kl",
        "keep_ratio": "dyntoken.losses.ratio:keep_ratio",
        "logit_kl": "dyntoken.losses.distill:logit_kl",
        "token_distill": "dyntoken.losses.distill:token_distill",
        "dense_distill": "dyntoken.losses.distill:dense_distill",
        "flops_share": "dyntoken.losses.flops_share:flops_share",
        "usage": "dyntoken.losses.usage:usage",
        "token_label": "dyntoken.losses.token_label:token_label",
    },
)

Specs = Sequence[tuple[str, Mapping[str, Any]]] | Mapping[str, Mapping[str, Any]]


def register_loss(
    name: str, fn: Callable[..., Pair], *, needs: Sequence[str] = (), exits: str | None = None
) -> None:
    """Adds a loss, a key of `config.losses`.

    Args:
      name: of the loss.
      fn: `fn(output, batch, **options) -> (sum, count)`; its options are keyword-only.
      needs: what it reads besides logits: "teacher", "features", "dense", "decision".
      exits: what it makes of a model with exits, see `common.Loss`.

    Raises:
      ValueError: a name that is taken, a function of other arguments, or an
        unknown need or mark.
    """
    check_call(f"loss {name!r}", fn, "output", "batch")
    for need in needs:
        if need not in NEEDS:
            raise UnknownNameError(f"loss {name!r}: unknown need {need!r}: {suggest(need, NEEDS)}")
    if exits not in EXITS:
        raise ValueError(f"loss {name!r}: exits must be 'each', 'earlier', 'none' or None, got {exits!r}")
    LOSSES.register(name, Loss(fn, frozenset(needs), exits))


def keywords(key: str) -> dict[str, Any]:
    """The options of a line of a loss list: name -> annotation, see `schema`.

    Raises:
      UnknownNameError: no such loss.
    """
    loss = LOSSES[key.partition("#")[0]]
    weights = {"weights": tuple[NonNegative, ...] | None} if loss.exits in ("each", "earlier") else {}
    return {"weight": NonNegative, **weights, **schema.keywords(loss.fn)}


def average(total: Array, count: Array) -> Array:
    """`total / count`, or 0 where nothing was counted."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)


@dataclasses.dataclass(frozen=True)
class Term:
    """One line of a loss list: `key` as logged, `weights` of the exits."""

    key: str
    loss: Loss
    weight: float
    weights: tuple[float, ...] | None
    options: Mapping[str, Any]

    def over_exits(self, values: Array) -> Array:
        """The weighted sum of one value per exit; a scalar is returned as it is."""
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
        which = "each exit but the last" if self.loss.exits == "earlier" else "each exit"
        raise ValueError(
            f"loss {self.key!r} has {len(self.weights)} weights for {terms} terms: give one for {which}"
        )


class Objective:
    """The weighted sum of a list of losses.

    Attributes:
      terms: the lines of the list.
      needs: what they read beside logits: `"teacher"` (`batch["teacher"]`),
        `"features"` (`Output.tokens` of student and teacher, i.e.
        `record=("features",)`), `"dense"` (`Output.dense` likewise), `"decision"` (of a method that learns it).

    Raises:
      UnknownNameError: for an unknown loss or option, naming the nearest.
      ValueError: if two losses have the same key or there is none.
    """

    def __init__(self, specs: Specs):
        terms: dict[str, Term] = {}
        for key, given in specs.items() if hasattr(specs, "items") else specs:
            name = key.partition("#")[0]
            options = schema.check(keywords(key), given, owner=f"loss {key!r}")
            if key in terms:
                raise ValueError(
                    f"loss {key!r} is listed twice: tell them apart as '{name}#a' and '{name}#b'"
                )
            weight, weights = options.pop("weight", 1.0), options.pop("weights", None)
            terms[key] = Term(key, LOSSES[name], weight, weights, options)
        if not terms:
            raise ValueError(f"no loss given: name at least one of {', '.join(LOSSES)}")
        self.terms = tuple(terms.values())
        self.needs = frozenset[str]().union(*(term.loss.needs for term in self.terms))

    def check(self, exits: int, *, learns: bool = True) -> None:
        """Raises ValueError for a loss that does not fit a model.

        Args:
          exits: of the model, 0: without.
          learns: whether its method learns its decision; a loss of weight 0 is only reported.
        """
        for term in self.terms:
            if "decision" in term.loss.needs and term.weight and not learns:
                raise ValueError(
                    f"loss {term.key!r} holds a decision that is learnt, as dtps_..., dynamicvit_... have one, and "
                    "would teach this model nothing: leave it out (of a recipe by "
                    f"--config.losses.{term.key}.weight=0), or set model.name to such a method"
                )
            check_exits(term.key, term.loss.exits, exits)
            term.check_weights(exits - 1 if term.loss.exits == "earlier" else exits)

    def evaluate(self, output: Output, batch: Mapping[str, Any]) -> dict[str, Pair]:
        """Every loss as an unweighted pair (sum, count) over this batch; of exits the sum may be `[exits]`."""
        pairs = {term.key: term.loss(output, batch, **term.options) for term in self.terms}
        return {
            key: (total.astype(jnp.float32), jax.lax.stop_gradient(count).astype(jnp.float32))
            for key, (total, count) in pairs.items()
        }

    def total(self, pairs: Mapping[str, Pair]) -> Array:
        """The weighted sum of the averages, a float32 scalar.

        On several devices pass local sums with counts already summed over the
        devices: the shares of all devices then add up to the total of the batch.
        """
        shares = [term.weight * term.over_exits(average(*pairs[term.key])) for term in self.terms]
        return sum(shares[1:], shares[0])

    def metrics(self, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
        """Pairs to be reported: a loss with one sum per exit becomes two rows.

        `key` is its weighted sum over the exits, so that the total stays the sum of
        weight times row, and `key_per_exit` has the unweighted sums `[exits]`.
        """
        rows = {}
        for term in self.terms:
            total, count = pairs[term.key]
            rows[term.key] = (term.over_exits(total), count)
            if total.ndim:
                rows[f"{term.key}_per_exit"] = (total, count)
        return rows
