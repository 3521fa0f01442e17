"""What a run trains from which step on, where its keep rate falls or takes turns."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import numpy as np

from dyntoken import models
from dyntoken.reducers import METHODS
from dyntoken.reducers.keep import quantize_keep_rates
from dyntoken.train.settings import KeepSchedule


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps that run one program.

    Attributes:
      first: steps done before it; phases of an elastic run take turns, see `phase_at`.
      model: with the counts of the phase; the parameters are those of every phase.
      counts: tokens that stay at each site.
    """

    first: int
    model: nn.Module
    counts: tuple[int, ...] = ()


def phase_at(phases: Sequence[Phase], done: int, *, seed: int | None = None) -> int:
    """Number of the phase of the step that follows `done` steps.

    Args:
      seed: of phases that take turns: of three steps one has the first, one the last, one any; None: each
        lasts until the next one begins.
    """
    last = len(phases) - 1
    if seed is None:
        return bisect.bisect_right([phase.first for phase in phases], done) - 1
    if done % 3 < 2:
        return 0 if done % 3 == 0 else last
    return int(np.random.default_rng((seed, done)).integers(last + 1))


def falling(
    model: nn.Module, schedule: KeepSchedule | None, *, steps_per_epoch: int, total_steps: int
) -> list[Phase]:
    """The phases of a run, by their first step; one without a schedule.

    Rates that leave the same tokens are one phase, and so is what begins after
    the end of the run.

    Raises:
      ValueError: a model whose keep rate cannot fall, or a schedule that does not fit.
    """
    if schedule is None or not schedule.end_epoch:
        return [Phase(0, model)]
    name = getattr(model, "method", None)
    if not isinstance(model, models.Model) or name is None:
        raise ValueError(
            "config.keep_schedule needs a model that drops tokens at one depth-wise set of sites, as "
            f"evit_deit_small_patch16_224; {getattr(model, 'arch', type(model).__name__)} has no keep rate of its own"
        )
    if any(site.reducer(parent=None).learns_share() for site in model.sites()):
        others = [other for other, row in METHODS.items() if not (row.plain.learns or row.plain.sized)]
        raise ValueError(
            f"config.keep_schedule does not fit {name}: its predictor learns which share to keep (loss "
            f"keep_ratio). Choose a method without one ({', '.join(others)}), train it with "
            "model.form='gather' if it has that form, or clear keep_schedule.end_epoch"
        )
    if any(site.reducer(parent=None).sized for site in model.sites()):
        raise ValueError(
            f"config.keep_schedule does not fit {name}: its parameters are made for one keep. Clear "
            "keep_schedule.end_epoch"
        )
    if not isinstance(model.keep, float):
        raise ValueError(
            f"config.keep_schedule falls to one rate, but config.model.keep is {model.keep}: give a number in "
            "(0, 1), or clear keep_schedule.end_epoch"
        )
    rates = quantize_keep_rates(
        base=model.keep,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=schedule.start_epoch,
        total_epochs=schedule.end_epoch,
        levels=schedule.levels,
    )
    phases: list[Phase] = []
    for first, rate in rates:
        smaller = model if rate == model.keep else model.clone(keep=rate)
        counts = tuple(site.reducer["keep"] for site in smaller.sites())
        if first < total_steps and not (phases and phases[-1].counts == counts):
            phases.append(Phase(first, smaller, counts))
    return phases


def elastic(model: nn.Module, rates: Sequence[float]) -> list[Phase]:
    """A phase per keep rate, the largest first.

    Raises:
      ValueError: a model without a keep rate of its own, or whose parameters are made for one.
    """
    name = getattr(model, "method", None)
    if not isinstance(model, models.Model) or name is None:
        raise ValueError(
            "config.elastic needs a model of one exit with a method, as etps_deit_small_patch16_224; "
            f"{getattr(model, 'arch', type(model).__name__)} has no keep rate of its own"
        )
    if any(site.reducer(parent=None).sized for site in model.sites()):
        raise ValueError(f"config.elastic does not fit {name}: its parameters are made for one keep")
    made = [model.clone(keep=rate) for rate in sorted(set(rates), reverse=True)]
    return [Phase(0, m, tuple(site.reducer["keep"] for site in m.sites())) for m in made]
