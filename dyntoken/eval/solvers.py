"""Threshold solvers: from scores on a calibration set to one threshold per exit.

A cascade leaves at the first exit whose score reaches its threshold. Three
ways to choose the thresholds, in one table, with one signature:

* `geometric`: the released code (`dynamic_find_threshold` and the p loop of
  `inference.py`, blackfeather-wang/Dynamic-Vision-Transformer), after MSDNet:
  exit shares proportional to q, q^2, q^3, read off as quantiles. It looks at
  no label, and its average cost is whatever comes out.
* `genetic`: the problem as the DVT paper states it (arXiv 2105.15075,
  budgeted batch classification): maximise accuracy under an average budget
  by an evolutionary search. The authors' genetic algorithm is not released;
  this is SciPy's differential evolution.
* `optimal`: the same problem solved exactly on the calibration set, or to a
  resolution that the result states.

Every solver is `(correct [E, N], scores [E, N], costs [E], budgets, *, seed, starts)
-> [Operating]`, one per budget; costs are cumulative, in MACs or in measured time.
Of the seed and of the known thresholds `starts` each uses what it needs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import optimize

from dyntoken.eval import exits, threshold_search
from dyntoken.eval.exits import SLACK, Operating
from dyntoken.eval.threshold_search import Ranks
from dyntoken.registry import Table

Array = np.ndarray

STEPS = tuple(range(1, 60))  # the released sweep: q = p / 20
CELLS = 1 << 21  # combinations that one grid may hold: two arrays of 16 MB
ZOOM = 1 << 13  # and that a grid around a solution does
WORK = 3 << 30  # cells of the three-exit sweep: 50,000 images are exact, in well under a minute
EXITS = 9  # a grid around a solution needs three cuts per exit at least


def geometric_shares(step: int | float, count: int) -> Array:
    """Exit shares proportional to q, q^2, ..., q = step / 20, float32 `[count]` as in the released code.

    Raises:
      ValueError: step is not positive, or there is no exit.
    """
    if not step > 0 or count < 1:
        raise ValueError(f"geometric shares need a positive step and an exit, got {step} and {count}")
    powers = np.exp(np.log(np.float32(step / 20)) * np.arange(1, count + 1, dtype=np.float32))
    return powers / powers.sum()


def find_threshold(scores: Any, shares: Any) -> Array:
    """Thresholds that let about `shares` of the images leave (the released `dynamic_find_threshold`).

    Exit k is to let floor(N share_k) of the images go that are still there;
    its threshold is the score of the last of them. Ties at that score leave as
    well. If none is to go, or fewer are left than are to go, no image leaves
    there (1e8). The last exit takes the rest (-1e8), its share is not read.

    Raises:
      ValueError: shares of another length, or NaN.
    """
    scores = exits.check_scores(scores)
    shares = np.asarray(shares, dtype=np.float32)
    if shares.shape != scores.shape[:1] or not (shares >= 0).all():
        raise ValueError(f"{len(scores)} exits need as many shares of at least 0, got {shares.tolist()}")
    limits = np.full(len(scores), exits.NEVER, scores.dtype)
    here = np.ones(scores.shape[1], dtype=bool)
    for exit_, row in enumerate(scores[:-1]):
        # Float32, as there: the product may fall on either side of a whole number.
        out = int(np.floor(np.float32(scores.shape[1]) * shares[exit_]))
        surest = np.sort(row[here])[::-1]
        if 1 <= out <= len(surest):
            limits[exit_] = surest[out - 1]
        here &= row < limits[exit_]
    limits[-1] = exits.ALWAYS
    return limits


def geometric_sweep(scores: Any, steps: Iterable[int | float] = STEPS) -> Array:
    """Thresholds `[len(steps), E]` of the released sweep: `find_threshold` of `geometric_shares`."""
    scores = exits.check_scores(scores)
    return np.stack([find_threshold(scores, geometric_shares(step, len(scores))) for step in steps])


def geometric(
    correct: Any, scores: Any, costs: Any, budgets: Any, *, seed: int = 0, starts: Any = ()
) -> list[Operating]:
    """For every budget the most accurate point of the released sweep that keeps it.

    The released code knows no budget: it reports the whole sweep. Where no
    point of the sweep is cheap enough, every image leaves at the first exit.

    Args:
      correct: bool `[E, N]`, see `exits.correct_of`.
      scores: `[E, N]`, higher is surer.
      costs: `[E]` cumulative, strictly increasing.
      budgets: one average cost, or several.

    Raises:
      ValueError: shapes that do not fit, NaN, costs that do not increase, or a budget below the first exit.
    """
    start = time.perf_counter()
    correct, scores, costs, budgets = _check(correct, scores, costs, budgets)
    first = np.full((1, len(scores)), exits.ALWAYS, scores.dtype)
    rows = [*first, *geometric_sweep(scores)]
    points = _best([exits.measure(correct, scores, row, costs) for row in rows], budgets)
    return _report(points, budgets, start, solver="geometric", evaluations=len(rows))


def genetic(
    correct: Any,
    scores: Any,
    costs: Any,
    budgets: Any,
    *,
    seed: int = 0,
    starts: Any = (),
    population: int = 50,
    generations: int = 60,
) -> list[Operating]:
    """Maximises accuracy under each budget by differential evolution (Storn and Price 1997).

    A gene is the share of an exit's distinct scores below its threshold;
    individuals that break the budget rank below all that keep it. The same
    seed gives the same thresholds. The result always keeps the budget: an
    individual that leaves at the first exit is in the first generation.

    Raises:
      ValueError: as `geometric`; less than 5 individuals or 1 generation.
    """
    correct, scores, costs, budgets = _check(correct, scores, costs, budgets)
    if population < 5 or generations < 1:
        raise ValueError(f"needs 5 individuals and 1 generation at least, got {population} and {generations}")
    ranks, result = Ranks(scores), []
    tops = np.array([len(values) for values in ranks.values])
    for budget in budgets:
        start = time.perf_counter()
        known: dict[tuple[int, ...], float] = {}  # twins are measured once

        def losses(genes: Array, budget: float = budget, known: dict[Any, float] = known) -> list[float]:
            rows = np.minimum(genes.T * (tops + 1), tops).astype(int).tolist()  # [individuals, E - 1]
            for cuts in {*map(tuple, rows)} - known.keys():
                point = exits.measure(correct, scores, ranks.thresholds(cuts), costs)
                kept = point.cost <= budget * (1 + SLACK)
                known[cuts] = -point.accuracy if kept else point.cost / budget
            return [known[tuple(row)] for row in rows]

        draw = np.random.default_rng(seed)
        first = draw.random((population, len(tops)))
        first[0] = 0.0  # every image leaves at the first exit
        bounds = [(0.0, 1.0)] * len(tops)
        options = {
            "maxiter": generations,
            "tol": 0.0,
            "polish": False,
            "vectorized": True,
            "updating": "deferred",
        }
        optimize.differential_evolution(losses, bounds, init=first, rng=draw, **options)
        best = min(sorted(known), key=known.__getitem__)
        limits = threshold_search.midpoints(scores, ranks.thresholds(best))
        point = exits.measure(correct, scores, limits, costs)
        result += _report([point], [budget], start, solver="genetic", evaluations=len(known))
    return result


def optimal(
    correct: Any,
    scores: Any,
    costs: Any,
    budgets: Any,
    *,
    seed: int = 0,
    starts: Any = (),
    levels: int | None = None,
) -> list[Operating]:
    """Maximises calibration accuracy under each budget; thresholds lie between scores.

    Exact (`resolution` 0.0) with two exits, with three up to about 50,000
    images, and with more wherever all combinations fit two million. Beyond
    that: the best of a grid of `levels` quantiles per exit, of the released
    sweep and of `starts`, refined by grids around it down to single images.
    Never below `geometric`; never below `genetic` either where exact, or where
    its thresholds are among `starts`.

    Args:
      levels: candidate thresholds per searched exit (with three exits: of the
        first one), at least 2; by default as many as fit.
      starts: thresholds `[S, E]` that the result may not fall behind.

    Raises:
      ValueError: as `geometric`; levels below 2; starts of another length; more than nine exits.
    """
    start = time.perf_counter()
    correct, scores, costs, budgets = _check(correct, scores, costs, budgets)
    if levels is not None and levels < 2:
        raise ValueError(f"levels must be at least 2 (every image leaves, none leaves), got {levels}")
    if len(scores) > EXITS:
        raise ValueError(f"the optimal solver takes up to {EXITS} exits, got {len(scores)}: use 'genetic'")
    known = [exits.check_thresholds(row, scores) for row in starts]
    ranks = Ranks(scores)
    cuts, tried, resolution = _exhaust(correct, ranks, costs, budgets, levels)
    if resolution > 0:
        rows = [*map(ranks.thresholds, cuts), *geometric_sweep(scores), *known]
        points = [exits.measure(correct, scores, row, costs) for row in rows]
        tried += len(points)
        for index in np.argsort(
            budgets, kind="stable"
        ):  # larger budgets start from smaller ones' results too
            budget = budgets[index : index + 1]
            begin = ranks.cuts(_best(points, budget)[0].thresholds)
            cuts[index], more = threshold_search.refine(correct, ranks, costs, budget, begin, ZOOM)
            points.append(exits.measure(correct, scores, ranks.thresholds(cuts[index]), costs))
            tried += more
    rows = [threshold_search.midpoints(scores, ranks.thresholds(row)) for row in cuts]
    points = [exits.measure(correct, scores, row, costs) for row in rows]
    return _report(points, budgets, start, solver="optimal", evaluations=tried, resolution=resolution)


def _exhaust(
    correct: Array, ranks: Ranks, costs: Array, budgets: Array, levels: int | None
) -> tuple[Array, int, float]:
    """Cuts `[B, E - 1]` of the best candidates, how many there were, and the resolution."""
    searched = len(ranks.values)
    if searched == 2:
        inner = len(ranks.values[1]) + 1
        outer = ranks.levels(0, levels or max(2, WORK // inner))
        cuts, _ = threshold_search.exact_three_exits(correct, ranks, costs, budgets, outer)
        return cuts, len(outer) * inner, ranks.gap(0, outer)
    fit = int(round(CELLS ** (1 / searched), 6))
    if levels is None and ranks.combinations <= CELLS:
        fit = CELLS  # every cut
    rows = [ranks.levels(exit_, min(levels or fit, fit)) for exit_ in range(searched)]
    hits, spent = threshold_search.grid(correct, ranks, costs, rows)
    chosen = threshold_search.best(hits.ravel(), spent.ravel(), budgets)
    places = np.unravel_index(chosen, hits.shape)
    cuts = np.stack([row[place] for row, place in zip(rows, places, strict=True)], axis=1)
    return cuts, hits.size, max(ranks.gap(exit_, row) for exit_, row in enumerate(rows))


def _best(points: Sequence[Operating], budgets: Array) -> list[Operating]:
    """The most accurate point that keeps each budget."""
    accuracy, cost = np.array([(point.accuracy, point.cost) for point in points]).T
    return [points[index] for index in threshold_search.best(accuracy, cost, budgets)]


def _check(correct: Any, scores: Any, costs: Any, budgets: Any) -> tuple[Array, Array, Array, Array]:
    correct, scores, costs = exits.check_calibration(correct, scores, costs)
    if len(scores) < 2:
        raise ValueError("one exit takes every image: thresholds need at least two exits")
    return correct, scores, costs, exits.check_budgets(budgets, costs)


def _report(points: Iterable[Operating], budgets: Any, start: float, **facts: Any) -> list[Operating]:
    facts["seconds"] = time.perf_counter() - start
    pairs = zip(points, budgets, strict=True)
    return [dataclasses.replace(point, budget=float(budget), **facts) for point, budget in pairs]


# From the quickest to the one whose thresholds are recommended.
SOLVERS = Table("threshold solver", {"geometric": geometric, "genetic": genetic, "optimal": optimal})
