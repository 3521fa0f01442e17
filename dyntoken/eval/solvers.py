"""Threshold solvers: from scores on a calibration set to one threshold per exit.

A cascade leaves at the first exit whose score reaches its threshold. Three
ways to choose the thresholds, in one table, with one signature:

* `geometric`: the released code (`dynamic_find_threshold` and the p loop of
  `inference.py`, blackfeather-wang/Dynamic-Vision-Transformer), after MSDNet:
  exit shares proportional to q, q^2, q^3, read off as quantiles. It looks at
  no label, and its average cost is whatever comes out.
* `genetic`: the problem as the DVT paper states it (arXiv 2105.15075,
  budgeted batch classification): maximise accuracy under an average budget,
  by a genetic algorithm. The authors released none, so the operators and
  their settings are ours.
* `optimal`: ours, the same problem solved exactly on the calibration set, or
  to a resolution that the result states.

Every solver is `(correct [E, N], scores [E, N], costs [E], budgets) ->
[Solution]`, one per budget; costs are cumulative, in MACs or in measured time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from dyntoken.eval import exits, threshold_search
from dyntoken.registry import Table

Array = np.ndarray

STEPS = tuple(range(1, 60))  # the released sweep: q = p / 20


@dataclasses.dataclass(frozen=True)
class Solution:
    """Thresholds for one budget, and what they do on the calibration set.

    Attributes:
      thresholds: `[E]`, in the dtype of the scores. Of `geometric` they are
        scores, as released; of the others they lie between two scores.
      accuracy: top-1 fraction.
      cost: average cost of an image, at most the budget.
      counts: images that leave at each exit, int64 `[E]`.
      budget: the average cost asked for.
      solver: name in `SOLVERS`.
      resolution: largest share of the calibration images between two
        neighbouring candidates of an exit; 0.0: every threshold that makes a
        difference was tried, the solution is optimal. None: the solver
        promises nothing.
      evaluations: sets of thresholds that the search compared.
      seconds: wall time of the search. `geometric` and `optimal` answer all
        budgets of a call together: each solution carries the call's numbers.
    """

    thresholds: Array
    accuracy: float
    cost: float
    counts: Array
    budget: float
    solver: str
    resolution: float | None
    evaluations: int
    seconds: float


# (a) the released quantile search


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
    well. If none is to go, or fewer are left than are to go, nobody leaves
    there (1e8). The last exit takes the rest (-1e8).

    Args:
      scores: `[E, N]`, higher is surer.
      shares: `[E]`; the last one is not read.

    Returns:
      `[E]` in the dtype of the scores.

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


def geometric(correct: Any, scores: Any, costs: Any, budgets: Any) -> list[Solution]:
    """For every budget the most accurate point of the released sweep that keeps it.

    The released code knows no budget: it reports the whole sweep. Where no
    point of the sweep is cheap enough, everybody leaves at the first exit.

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
    rows = np.concatenate([first, geometric_sweep(scores)])
    points = [exits.measure(correct, scores, row, costs) for row in rows]
    accuracy, cost = np.array([(point.accuracy, point.cost) for point in points]).T
    chosen = rows[threshold_search.best(accuracy, cost, budgets)]
    known = {"solver": "geometric", "resolution": None, "evaluations": len(rows)}
    return _solutions(correct, scores, costs, budgets, chosen, start, known)


# (b) the paper's genetic search


@dataclasses.dataclass(frozen=True)
class _Genes:
    """Settings of the genetic search; a gene is the share of distinct scores below the threshold."""

    population: int
    elite: int = 2  # the best go on unchanged
    rivals: int = 3  # of a tournament
    mutated: float = 0.3  # share of genes
    spread: float = 0.1  # standard deviation of a mutation, shrinking to a tenth of it

    def next(self, genes: Array, fitness: Array, progress: float, draw: np.random.Generator) -> Array:
        """The next generation `[population, E - 1]`."""
        rank = np.argsort(-fitness, kind="stable")
        children = self.population - self.elite
        rivals = draw.integers(self.population, size=(2, children, self.rivals))
        winners = np.take_along_axis(rivals, fitness[rivals].argmax(-1)[..., None], -1)[..., 0]
        mother, father = genes[winners]
        blend = draw.uniform(-0.25, 1.25, size=mother.shape)  # may leave the segment a little
        child = mother + blend * (father - mother)
        noise = draw.normal(0, self.spread * (1 - 0.9 * progress), size=child.shape)
        child = child + noise * (draw.random(child.shape) < self.mutated)
        return np.concatenate([genes[rank[: self.elite]], child.clip(0, 1)])


def genetic(
    correct: Any,
    scores: Any,
    costs: Any,
    budgets: Any,
    *,
    seed: int = 0,
    population: int = 50,
    generations: int = 60,
) -> list[Solution]:
    """Maximises accuracy under each budget by a genetic algorithm (the DVT paper's choice).

    Tournament selection, blend crossover, Gaussian mutation, two elites; who
    breaks the budget ranks below everybody who keeps it. The same arguments
    give the same thresholds. The result always keeps the budget: one individual
    that leaves at the first exit is in the first generation.

    Args:
      correct, scores, costs, budgets: as `geometric`.
      seed: of the search; every budget starts from it.
      population: individuals, at least 4.
      generations: at least 1.

    Raises:
      ValueError: as `geometric`, or too small a population.
    """
    correct, scores, costs, budgets = _check(correct, scores, costs, budgets)
    if population < 4 or generations < 1:
        raise ValueError(f"needs 4 individuals and 1 generation at least, got {population} and {generations}")
    ranks = threshold_search.Ranks(scores)
    result = []
    for budget in budgets:
        start = time.perf_counter()
        settings = _Genes(population)
        best, tried = _evolve(correct, scores, costs, float(budget), ranks, settings, generations, seed)
        known = {"solver": "genetic", "resolution": None, "evaluations": tried}
        result += _solutions(correct, scores, costs, np.array([budget]), best[None], start, known)
    return result


def _evolve(
    correct: Array,
    scores: Array,
    costs: Array,
    budget: float,
    ranks: threshold_search.Ranks,
    settings: _Genes,
    generations: int,
    seed: int,
) -> tuple[Array, int]:
    draw = np.random.default_rng(seed)
    genes = draw.random((settings.population, len(scores) - 1))
    genes[0] = 0.0  # everybody leaves at the first exit
    tops = np.array([len(values) for values in ranks.values])
    known: dict[tuple[int, ...], float] = {}  # elites and twins are measured once

    def fitness(row: Array) -> float:
        cuts = tuple(np.minimum(row * (tops + 1), tops).astype(int).tolist())
        if cuts not in known:
            point = exits.measure(correct, scores, ranks.thresholds(cuts), costs)
            kept = exits.within(point.cost, budget)
            known[cuts] = point.accuracy if kept else 1 - point.cost / budget
        return known[cuts]

    for generation in range(generations):
        values = np.array([fitness(row) for row in genes])
        genes = settings.next(genes, values, generation / generations, draw)
    for row in genes:
        fitness(row)
    best = max(known, key=lambda cuts: known[cuts])  # the first of equals
    return threshold_search.between(scores, ranks.thresholds(best)), len(known)


# (c) ours

CELLS = 1 << 21  # combinations that one grid may hold: two arrays of 16 MB
ZOOM = 1 << 13  # and that a grid around a solution does
AROUND = 1 << 17  # and the one that chooses among equals: 180 cuts to either side with three exits
WORK = 3 << 30  # cells of the three-exit sweep: 50,000 images are exact, in well under a minute
EXITS = 9  # a grid around a solution needs three cuts per exit at least


def optimal(
    correct: Any,
    scores: Any,
    costs: Any,
    budgets: Any,
    *,
    levels: int | None = None,
    starts: Any = None,
) -> list[Solution]:
    """Maximises calibration accuracy under each budget; of equals, what promises most elsewhere.

    Exact (`resolution` 0.0) with two exits, with three up to about 50,000
    images, and with more wherever all combinations fit two million. Beyond
    that: the best of a grid of `levels` quantiles per exit, of the released
    sweep and of `starts`, refined by grids around it down to single images.
    Never below `geometric`; never below `genetic` either where exact, or where
    its thresholds are among `starts`.

    On a small set many combinations are equally good. Of those near the one
    found, the one whose neighbours are best is taken (`threshold_search.settle`), and
    of equals the cheapest; thresholds lie between scores (`threshold_search.between`).

    Args:
      correct, scores, costs, budgets: as `geometric`.
      levels: candidate thresholds per searched exit (with three exits: of the
        first one), at least 2; by default as many as fit.
      starts: thresholds `[S, E]` that the result may not fall behind.

    Raises:
      ValueError: as `geometric`; levels below 2; starts of another length; more than nine exits.
    """
    start = time.perf_counter()
    correct, scores, costs, budgets = _check(correct, scores, costs, budgets)
    if levels is not None and levels < 2:
        raise ValueError(f"levels must be at least 2 (everybody leaves, nobody leaves), got {levels}")
    if len(scores) > EXITS:
        raise ValueError(f"the optimal solver takes up to {EXITS} exits, got {len(scores)}: use 'genetic'")
    known = geometric_sweep(scores)
    if starts is not None:
        rows = [exits.check_thresholds(row, scores) for row in starts]
        known = np.concatenate([known, np.reshape(rows, (-1, len(scores)))])
    ranks = threshold_search.Ranks(scores)
    cuts, tried, resolution = _search(correct, ranks, costs, budgets, levels)
    if resolution > 0:
        cuts, more = _refine(correct, scores, ranks, costs, budgets, cuts, known)
        tried += more
    chosen = []
    for row, budget in zip(cuts, budgets, strict=True):
        row = threshold_search.settle(correct, ranks, costs, float(budget), row, AROUND)
        chosen.append(threshold_search.between(scores, ranks.thresholds(row)))
    facts = {"solver": "optimal", "resolution": resolution, "evaluations": tried}
    return _solutions(correct, scores, costs, budgets, chosen, start, facts)


def _search(
    correct: Array, ranks: threshold_search.Ranks, costs: Array, budgets: Array, levels: int | None
) -> tuple[Array, int, float]:
    """Cuts `[B, E - 1]` of the best candidates, how many there were, and the resolution."""
    searched = len(ranks.values)
    if searched == 2:
        inner = len(ranks.values[1]) + 1
        outer = ranks.levels(0, levels or max(2, WORK // inner))
        cuts, _ = threshold_search.sweep(correct, ranks, costs, budgets, outer)
        return cuts, len(outer) * inner, ranks.gap(0, outer)
    if levels is None and ranks.combinations <= CELLS:
        rows = [np.arange(len(values) + 1) for values in ranks.values]
    else:
        fit = int(round(CELLS ** (1 / searched), 6))
        rows = [ranks.levels(exit_, min(levels or fit, fit)) for exit_ in range(searched)]
    hits, spent = threshold_search.grid(correct, ranks, costs, rows)
    chosen = threshold_search.best(hits.ravel(), spent.ravel(), budgets)
    places = np.unravel_index(chosen, hits.shape)
    cuts = np.array([row[place] for row, place in zip(rows, places, strict=True)], dtype=np.int64)
    resolution = max(ranks.gap(exit_, row) for exit_, row in enumerate(rows))
    return cuts.reshape(searched, len(budgets)).T, hits.size, resolution


def _refine(
    correct: Array,
    scores: Array,
    ranks: threshold_search.Ranks,
    costs: Array,
    budgets: Array,
    cuts: Array,
    known: Array,
) -> tuple[Array, int]:
    """Better cuts `[B, E - 1]` and how many more were tried; larger budgets start from smaller ones' too."""
    rows = np.concatenate([cuts, [ranks.cuts(row) for row in known]])
    points = [exits.measure(correct, scores, ranks.thresholds(row), costs) for row in rows]
    accuracy, cost = (list(values) for values in zip(*((p.accuracy, p.cost) for p in points), strict=True))
    rows, tried = list(rows), len(rows)
    result = np.empty_like(cuts)
    for index in np.argsort(budgets, kind="stable"):
        budget = budgets[index : index + 1]
        begin = rows[int(threshold_search.best(np.array(accuracy), np.array(cost), budget)[0])]
        result[index], more = threshold_search.zoom(correct, ranks, costs, float(budget[0]), begin, ZOOM)
        point = exits.measure(correct, scores, ranks.thresholds(result[index]), costs)
        rows.append(result[index])
        accuracy.append(point.accuracy)
        cost.append(point.cost)
        tried += more
    return result, tried


def _check(correct: Any, scores: Any, costs: Any, budgets: Any) -> tuple[Array, Array, Array, Array]:
    correct, scores, costs = exits.check_calibration(correct, scores, costs)
    if len(scores) < 2:
        raise ValueError("one exit takes every image: thresholds need at least two exits")
    return correct, scores, costs, exits.check_budgets(budgets, costs)


def _solutions(
    correct: Array,
    scores: Array,
    costs: Array,
    budgets: Array,
    chosen: Array,
    start: float,
    known: dict[str, Any],
) -> list[Solution]:
    seconds = time.perf_counter() - start
    result = []
    for budget, row in zip(budgets, chosen, strict=True):
        point = exits.measure(correct, scores, row, costs)
        result.append(
            Solution(row, point.accuracy, point.cost, point.counts, float(budget), seconds=seconds, **known)
        )
    return result


SOLVERS = Table("threshold solver", {"geometric": geometric, "genetic": genetic, "optimal": optimal})
