"""Where to reduce and by how much, by dynamic programming over measured errors and costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

STEPS = 400  # cost is counted in so many parts of the dense model's


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Blocks that reduce, how many patches each leaves, and what is expected of it.

    Attributes:
      at: increasing block indices.
      keep: counts of patches, decreasing.
      cost: predicted, as a share of the dense model's.
      error: predicted, the sum of the sites' errors.
    """

    at: tuple[int, ...]
    keep: tuple[int, ...]
    cost: float
    error: float


def block_costs(
    depth: int, site: int, inside: bool, totals: Mapping[int, float], patches: int
) -> dict[int, float]:
    """Cost of one block by number of patches, as a share of a dense one.

    Args:
      depth: blocks of the model.
      site: block that reduced where `totals` were measured.
      inside: whether it reduces between attention and MLP: then its attention runs on all rows.
      totals: by the count it left, the cost of the whole model as a share of the dense one's.
      patches: of the dense model, whose share is 1.
    """
    ahead = site + (ATTENTION if inside else 0.0)
    costs = {count: (total * depth - ahead) / (depth - ahead) for count, total in totals.items()}
    return {**{count: float(np.clip(cost, 0.01, 1.0)) for count, cost in costs.items()}, patches: 1.0}


ATTENTION = 1 / 3  # its share of a block, by multiply-adds of an MLP of ratio 4


def total_cost(
    depth: int, at: Sequence[int], keep: Sequence[int], inside: bool, costs: Mapping[int, float]
) -> float:
    """Predicted cost of a schedule, as a share of the dense model's; costs between counts are interpolated."""
    counts = sorted(costs)
    each = lambda count: float(np.interp(count, counts, [costs[c] for c in counts]))  # noqa: E731
    current, total = max(counts), 0.0
    left = dict(zip(at, keep, strict=True))
    for block in range(depth):
        before, current = current, left.get(block, current)
        first = before if inside else current
        total += ATTENTION * each(first) + (1 - ATTENTION) * each(current)
    return total / depth


def search(
    depth: int,
    inside: bool,
    errors: Mapping[tuple[int, int], float],
    costs: Mapping[int, float],
    budget: float,
    *,
    sites: int | None = None,
) -> Schedule | None:
    """The schedule of least predicted error whose predicted cost stays within a budget.

    A site that takes the patches from m to n at block b is charged the error of n there less
    that of m there, which were measured with no other site.

    Args:
      depth, inside: see `block_costs`.
      errors: by (block, count), of a model that reduces only there.
      costs: by count, see `block_costs`; the largest count is the dense one.
      budget: share of the dense model's cost.
      sites: at most so many; None: any number.

    Returns:
      The schedule, or None where the fewest patches at the first block are too dear.
    """
    counts = sorted(costs, reverse=True)
    limit = int(budget * STEPS + 1e-9)
    most = depth if sites is None else sites
    # best[level, number of sites so far] -> cost in steps -> (error, path); Pareto fronts stay small.
    best = {(0, 0): {0.0: (0.0, ())}}
    for block in range(depth):
        following: dict[tuple[int, int], dict[float, tuple[float, tuple]]] = {}
        for (level, used), front in best.items():
            for target in range(level, len(counts)):
                jump = target != level
                if jump and (used == most or (block, counts[target]) not in errors):
                    continue
                added = 0.0
                if jump:
                    before = errors.get((block, counts[level]), 0.0) if level else 0.0
                    added = max(errors[block, counts[target]] - before, 0.0)
                first = level if inside else target
                step = ATTENTION * costs[counts[first]] + (1 - ATTENTION) * costs[counts[target]]
                move = ((block, counts[target]),) if jump else ()
                into = following.setdefault((target, used + jump), {})
                for spent, (error, path) in front.items():
                    total = round(spent + step * STEPS / depth, 3)
                    if total <= limit and (total not in into or into[total][0] > error + added):
                        into[total] = (error + added, path + move)
        best = {state: _front(front) for state, front in following.items()}
    ends = [(error, spent, path) for front in best.values() for spent, (error, path) in front.items()]
    if not ends:
        return None
    error, spent, path = min(ends)
    at, keep = zip(*path, strict=True) if path else ((), ())
    return Schedule(at, keep, spent / STEPS, error)


def _front(front: dict[float, tuple[float, tuple]]) -> dict[float, tuple[float, tuple]]:
    """Only what nothing cheaper beats, at most one entry per whole step of cost."""
    kept: dict[float, tuple[float, tuple]] = {}
    least, last = np.inf, -1
    for spent in sorted(front):
        if front[spent][0] < least and int(spent) != last:
            kept[spent], least, last = front[spent], front[spent][0], int(spent)
    return kept
