"""Thresholds found on one half of a split, judged on the other.

The images of even index are the calibration half, those of odd index the
held-out half: both see the same mixture of classes wherever the split is
shuffled or sorted by class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dyntoken.eval import exits, solvers
from dyntoken.eval.solvers import Solution

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


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a cost-accuracy plot.

    Attributes:
      kind: "anytime" (every image leaves at one exit) or "budgeted".
      solver, budget: of a budgeted point, else None.
      rule: exit rule.
      half: `CALIBRATION` or `HELD_OUT`.
      cost: average cost of an image.
      accuracy: top-1 fraction.
      error: its standard error, binomial.
      shares: of the images that leave at each exit.
    """

    kind: str
    solver: str | None
    rule: str
    half: str
    budget: float | None
    cost: float
    accuracy: float
    error: float
    shares: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One solver against another over several budgets, on one half.

    Attributes:
      half: `CALIBRATION` or `HELD_OUT`.
      budgets: how many there are.
      above: at how many of them the first is at least as accurate.
      difference: mean over the budgets of accuracy minus accuracy, as a fraction.
      error: standard error of that mean, from the images' paired differences.
      shortfall: the largest lead of the second at one budget, in standard
        errors of the first's accuracy there; 0.0 if it never leads.
    """

    half: str
    budgets: int
    above: int
    difference: float
    error: float
    shortfall: float


def halves(logits: Any, labels: Any, rule: str, *, seed: int = 0) -> tuple[Half, Half]:
    """The calibration and the held-out half of a split.

    Args:
      logits: `[E, N, K]` in the order of the split.
      labels: `[N]`.
      rule: of `exits.RULES`.
      seed: of the random rule.

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


def sweep(costs: Sequence[float] | Array, points: int) -> Array:
    """Evenly spaced budgets `[points]` from the first exit's cost to the last one's."""
    if points < 2:
        raise ValueError(f"a sweep has two ends: points must be at least 2, got {points}")
    return np.linspace(costs[0], costs[-1], points)


def solve(names: Sequence[str], half: Half, costs: Any, budgets: Any, *, seed: int = 0) -> dict[str, list]:
    """Solutions of each solver for each budget, by name.

    `optimal` starts from what the genetic search found where both are asked
    for, so that it is never below it.

    Args:
      names: of `solvers.SOLVERS`.
      half: to calibrate on.
      costs: `[E]` cumulative.
      budgets: average costs.
      seed: of the genetic search.

    Raises:
      UnknownNameError: no such solver.
      ValueError: what the solvers refuse.
    """
    found: dict[str, list[Solution]] = {}
    for name in sorted(names, key=list(solvers.SOLVERS).index):  # optimal comes last
        solver, more = solvers.SOLVERS[name], {}
        if name == "genetic":
            more["seed"] = seed
        if name == "optimal" and "genetic" in found:
            more["starts"] = [solution.thresholds for solution in found["genetic"]]
        found[name] = solver(half.correct, half.scores, costs, budgets, **more)
    return found


def anytime(half: Half, costs: Any, rule: str) -> list[Point]:
    """One point per exit."""
    curve = exits.anytime(half.correct, costs)
    return [
        _point("anytime", None, rule, half, None, accuracy, cost, counts)
        for accuracy, cost, counts in zip(curve.accuracy, curve.cost, curve.counts, strict=True)
    ]


def budgeted(half: Half, solutions: Sequence[Solution], costs: Any, rule: str) -> list[Point]:
    """One point per solution, in their order."""
    points = []
    for solution in solutions:
        found = exits.evaluate(half.correct, half.scores, solution.thresholds, costs)
        points.append(
            _point(
                "budgeted",
                solution.solver,
                rule,
                half,
                solution.budget,
                found.accuracy,
                found.cost,
                found.counts,
            )
        )
    return points


def _point(kind, solver, rule, half, budget, accuracy, cost, counts) -> Point:
    shares = tuple((np.asarray(counts) / half.images).tolist())
    error = float(np.sqrt(accuracy * (1 - accuracy) / half.images))
    return Point(kind, solver, rule, half.name, budget, float(cost), float(accuracy), error, shares)


def compare(half: Half, ours: Sequence[Solution], other: Sequence[Solution]) -> Comparison:
    """`ours` against `other`, budget by budget."""
    mine = np.stack([half.right(solution.thresholds) for solution in ours]).astype(float)  # [M, N]
    theirs = np.stack([half.right(solution.thresholds) for solution in other]).astype(float)
    gains = mine.mean(axis=1) - theirs.mean(axis=1)  # [M]
    per_image = (mine - theirs).mean(axis=0)  # [N]
    errors = np.sqrt((mine.mean(axis=1) * (1 - mine.mean(axis=1))) / half.images)
    behind = np.divide(-gains, errors, out=np.where(gains < 0, np.inf, 0.0), where=errors > 0)
    return Comparison(
        half=half.name,
        budgets=len(gains),
        above=int((gains >= 0).sum()),
        difference=float(gains.mean()),
        error=float(per_image.std(ddof=1) / np.sqrt(half.images)) if half.images > 1 else 0.0,
        shortfall=float(behind.clip(0).max()),
    )


def as_json(solutions: Mapping[str, Sequence[Solution]]) -> dict[str, list[dict[str, Any]]]:
    """Solutions in plain values, by solver."""
    return {
        name: [
            {
                "budget": s.budget,
                "thresholds": s.thresholds.tolist(),
                "accuracy": s.accuracy,
                "cost": s.cost,
                "counts": s.counts.tolist(),
                "resolution": s.resolution,
                "evaluations": s.evaluations,
                "seconds": s.seconds,
            }
            for s in rows
        ]
        for name, rows in solutions.items()
    }
