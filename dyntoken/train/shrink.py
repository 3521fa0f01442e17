"""A keep rate that falls during training: a few stages, one compiled step each (EViT from scratch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import flax.linen as nn

from dyntoken import schema
from dyntoken.models import Model
from dyntoken.reducers import METHODS
from dyntoken.reducers.keep import quantize_keep_rates
from dyntoken.schema import Natural, within


@dataclasses.dataclass(frozen=True)
class Shrink:
    """`config.keep_schedule`; follows youweiliang/evit, `adjust_keep_rate`.

    Until `start_epoch` every token stays; then the rate falls by a cosine to
    that of the model, which holds from `end_epoch` on. It fixes shapes, so it is
    rounded to a few `levels` (see `reducers.keep.quantize_keep_rates`).

    Attributes:
      start_epoch: whole epochs at rate 1.
      end_epoch: first epoch at the model's own rate; 0: no schedule.
      levels: number of rates, the first and the last included.
    """

    start_epoch: Natural = 0
    end_epoch: Natural = 0
    levels: Annotated[int, within("[2, inf)")] = 5

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Shrink | None:
        """From the section of the config; None if it asks for nothing."""
        found = schema.check(cls, given or {}, "config.keep_schedule")
        return found if found.end_epoch else None


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps that run one program.

    Attributes:
      first: steps done before it.
      model: with the counts of the stage; the parameters are those of every stage.
      counts: tokens that stay at each site.
    """

    first: int
    model: nn.Module
    counts: tuple[int, ...]


def stages(model: nn.Module, shrink: Shrink | None, *, steps_per_epoch: int, total_steps: int) -> list[Stage]:
    """The stages of a run, by their first step; one without a schedule.

    Rates that leave the same tokens are one stage, and so is what begins after
    the end of the run.

    Raises:
      ValueError: a model whose keep rate cannot fall, or a schedule that does not fit.
    """
    if shrink is None:
        return [Stage(0, model, ())]
    _check(model)
    rates = quantize_keep_rates(
        base=model.keep,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=shrink.start_epoch,
        total_epochs=shrink.end_epoch,
        levels=shrink.levels,
    )
    found: list[Stage] = []
    for first, rate in rates:
        smaller = model if rate == model.keep else model.clone(keep=rate)
        counts = tuple(site.reducer["keep"] for site in smaller.sites())
        if first < total_steps and not (found and found[-1].counts == counts):
            found.append(Stage(first, smaller, counts))
    return found


def _check(model: nn.Module) -> None:
    """Raises unless one rate decides all that the model drops, and nothing is learnt about it."""
    name = getattr(model, "method", None)
    if not isinstance(model, Model) or name is None:
        raise ValueError(
            "config.keep_schedule needs a model that drops tokens at one depth-wise set of sites, as "
            f"evit_deit_small_patch16_224; {getattr(model, 'arch', type(model).__name__)} has no keep rate of its own"
        )
    if any(site.reducer(parent=None).learns for site in model.sites()):
        others = [other for other, row in METHODS.items() if not row.plain.learns]
        raise ValueError(
            f"config.keep_schedule does not fit {name}: its predictor learns which share to keep (loss "
            f"keep_ratio). Choose a method without one ({', '.join(others)}), or clear keep_schedule.end_epoch"
        )
    if not isinstance(model.keep, float):
        raise ValueError(
            f"config.keep_schedule falls to one rate, but config.model.keep is {model.keep}: give a number in "
            "(0, 1), or clear keep_schedule.end_epoch"
        )
