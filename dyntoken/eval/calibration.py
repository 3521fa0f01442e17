"""Thresholds found on one half of a split, judged on the other.

The images of even index are the calibration half, those of odd index the
held-out half: both see the same mixture of classes wherever the split is
shuffled or sorted by class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dyntoken.eval import exits
from dyntoken.eval.exits import Operating
from dyntoken.eval.solvers import SOLVERS

Array = np.ndarray
CALIBRATION, HELD_OUT = "calibration", "held-out"


@dataclasses.dataclass(frozen=True)
class Half:
    """Images of one half.

    Attributes:
      name: `CALIBRATION` or `HELD_OUT`.
      correct: whether each exit is right, bool `[E, N]`.
      scores: of the exit rule, `[E, N]`.
    """

    name: str
    correct: Array
    scores: Array

    @property
    def images(self) -> int:
        return self.correct.shape[1]

    def right(self, limits: Any) -> Array:
        """Whether the exit that each image takes is right, bool `[N]`, for thresholds `[E]`."""
        return np.take_along_axis(self.correct, exits.exit_of(self.scores, limits)[None], axis=0)[0]

    def judge(self, solution: Operating, costs: Any) -> Operating:
        """What the thresholds of a solution do on this half."""
        point = exits.evaluate(self.correct, self.scores, solution.thresholds, costs)
        return dataclasses.replace(point, budget=solution.budget, solver=solution.solver)


def halves(logits: Any, labels: Any, rule: str, *, seed: int = 0) -> tuple[Half, Half]:
    """The calibration and the held-out half of logits `[E, N, K]` and labels `[N]` in the order of a split.

    Raises:
      UnknownNameError: no such rule.
      ValueError: fewer than two images, or what `exits.score` refuses.
    """
    scores, correct = exits.score(rule, logits, seed=seed), exits.correct_of(logits, labels)
    if scores.shape[1] < 2:
        raise ValueError("one image makes no two halves: choose a larger split")
    return (
        Half(CALIBRATION, correct[:, ::2], scores[:, ::2]),
        Half(HELD_OUT, correct[:, 1::2], scores[:, 1::2]),
    )


def solve(
    names: Sequence[str], half: Half, costs: Any, budgets: Any, *, seed: int = 0
) -> dict[str, list[Operating]]:
    """Solutions of each of the named solvers for each budget, in the order of `SOLVERS`.

    Each may start from what those before it found, so that `optimal` is never
    below them.

    Raises:
      UnknownNameError: no such solver.
      ValueError: what the solvers refuse.
    """
    found: dict[str, list[Operating]] = {}
    for name in sorted(names, key=list(SOLVERS).index):
        starts = [point.thresholds for points in found.values() for point in points]
        found[name] = SOLVERS[name](half.correct, half.scores, costs, budgets, seed=seed, starts=starts)
    return found


def compare(half: Half, ours: Sequence[Operating], other: Sequence[Operating]) -> dict[str, float]:
    """One solver against another over the same budgets, on one half.

    Returns:
      `budgets`, their number; `above`, at how many of them ours is at least as
      accurate; `difference`, the mean over the budgets of accuracy minus
      accuracy, as a fraction, and `error`, its standard error from the images'
      paired differences; `shortfall`, the largest lead of the other at one
      budget in standard errors of our accuracy there, 0.0 if it never leads.
    """
    mine = np.stack([half.right(solution.thresholds) for solution in ours]).astype(float)  # [M, N]
    theirs = np.stack([half.right(solution.thresholds) for solution in other]).astype(float)
    gains = mine.mean(axis=1) - theirs.mean(axis=1)  # [M]
    per_image = (mine - theirs).mean(axis=0)  # [N]
    errors = np.sqrt((mine.mean(axis=1) * (1 - mine.mean(axis=1))) / half.images)
    behind = np.divide(-gains, errors, out=np.where(gains < 0, np.inf, 0.0), where=errors > 0)
    return {
        "budgets": len(gains),
        "above": int((gains >= 0).sum()),
        "difference": float(gains.mean()),
        "error": float(per_image.std(ddof=1) / np.sqrt(half.images)) if half.images > 1 else 0.0,
        "shortfall": float(behind.clip(0).max()),
    }
