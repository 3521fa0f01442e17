"""The best thresholds under a budget: searches over ranks, for all budgets at once.

What counts of a threshold is which of an exit's calibration scores it lets
leave, so exit k has one candidate ("cut") per distinct score, and one for
nobody: cut i lets the scores of rank >= i leave. Searching cuts therefore
loses nothing. The thresholds of several exits do not separate (who arrives at
an exit depends on every earlier threshold), so that the searches are joint:

* `grid`: every combination of given cuts, by cumulative sums over the joint
  histogram of ranks: O(N E + product of the numbers of cuts).
* `sweep`: three exits, every combination of cuts without enumerating them:
  prefix sums over the second exit's ranks, updated as images join.
* `zoom`: `grid` around a known combination, closer and closer.
* `settle`: of combinations near a known one that are exactly as good, the one
  whose neighbours are best: the optimum of a small set is often a lucky edge.

`between` then moves thresholds off the scores themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dyntoken.eval.exits import ALWAYS, NEVER, SLACK

Array = np.ndarray
FEW = 16  # images that join one by one; more are cheaper as one histogram


class Ranks:
    """Calibration scores as ranks among the distinct scores of their exit.

    Attributes:
      values: per exit but the last, ascending distinct scores `[U_k]`.
      rank: int64 `[E - 1, N]`, where in `values` each score is.
    """

    def __init__(self, scores: Array):
        pairs = [np.unique(row, return_inverse=True) for row in scores[:-1]]
        self.images = scores.shape[1]
        self.dtype = scores.dtype
        self.values = [values for values, _ in pairs]
        self.rank = np.stack([rank for _, rank in pairs])

    @property
    def combinations(self) -> int:
        """How many sets of thresholds differ on the calibration set, at most."""
        total = 1
        for values in self.values:
            total *= len(values) + 1  # Python ints: never overflow
        return total

    def cuts(self, thresholds: Array) -> Array:
        """The cuts `[E - 1]` that thresholds `[E]` are equal to on the calibration set."""
        pairs = zip(self.values, thresholds, strict=False)  # the last exit takes everybody
        return np.array([np.searchsorted(values, limit) for values, limit in pairs], dtype=np.int64)

    def thresholds(self, cuts: Sequence[int] | Array) -> Array:
        """Thresholds `[E]` of cuts `[E - 1]`: calibration scores in their own dtype, never, or always."""
        limits = []
        for values, cut in zip(self.values, cuts, strict=True):
            # Cut 0 is not "above the lowest score": everybody leaves, on other images too.
            limits.append(ALWAYS if cut == 0 else NEVER if cut == len(values) else values[cut])
        return np.array([*limits, ALWAYS], dtype=self.dtype)

    def levels(self, exit_: int, count: int) -> Array:
        """At most `count` cuts of one exit, with about as many images between each two; both ends are in."""
        last = len(self.values[exit_])
        if last + 1 <= count:
            return np.arange(last + 1)
        below = np.concatenate([[0], np.cumsum(np.bincount(self.rank[exit_], minlength=last))])  # [U + 1]
        return np.unique(np.searchsorted(below, np.linspace(0, self.images, count)))

    def gap(self, exit_: int, cuts: Array) -> float:
        """Largest share of images between two neighbouring cuts that have other cuts between them."""
        below = np.concatenate([[0], np.cumsum(np.bincount(self.rank[exit_]))])  # [U + 1]
        skipped = np.diff(cuts) > 1
        return float(np.diff(below[cuts])[skipped].max(initial=0)) / self.images


def best(hits: Array, costs: Array, budgets: Array) -> Array:
    """For every budget the candidate with most hits whose average cost keeps it; the cheapest of equals.

    Args:
      hits: `[M]`; costs: `[M]`; budgets: `[B]`.

    Returns:
      int64 `[B]` indices; -1 where no candidate is cheap enough.
    """
    order = np.argsort(costs, kind="stable")
    order = order[: int(np.searchsorted(costs[order], budgets.max() * (1 + SLACK), side="right"))]
    if not len(order):
        return np.full(len(budgets), -1)
    sorted_hits = hits[order]
    record = np.maximum.accumulate(sorted_hits)
    fresh = np.concatenate([[True], sorted_hits[1:] > record[:-1]])
    holder = np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))
    affordable = np.searchsorted(costs[order], budgets * (1 + SLACK), side="right") - 1
    return np.where(affordable < 0, -1, order[holder[affordable]])


def grid(correct: Array, ranks: Ranks, costs: Array, cuts: Sequence[Array]) -> tuple[Array, Array]:
    """Hits and average cost of every combination of cuts.

    An image with score rank r leaves at cut i if r >= i. Exit k's share of a
    combination depends on the cuts 0..k only: one table of k + 1 dimensions
    per exit, summed by broadcasting.

    Args:
      correct: bool `[E, N]`.
      ranks: of the scores.
      costs: `[E]` cumulative.
      cuts: per exit but the last, ascending cuts `[g_k]`.

    Returns:
      hits and costs, float64 `[g_0, ..., g_{E-2}]`.
    """
    sizes = tuple(len(row) for row in cuts)
    # An image leaves under the first `under` of the cuts, the low ones.
    under = [np.searchsorted(row, rank, side="right") for row, rank in zip(cuts, ranks.rank, strict=True)]
    hits, spent = np.zeros(sizes), np.zeros(sizes)
    for exit_, row in enumerate(correct):
        axes = min(exit_ + 1, len(sizes))  # the last exit has no cut of its own
        shape = tuple(size + 1 for size in sizes[:axes])
        cell = np.ravel_multi_index(tuple(under[:axes]), shape)
        length = int(np.prod(shape))
        tail = (1,) * (len(sizes) - axes)
        count = _arriving(np.bincount(cell, minlength=length).reshape(shape).astype(float), exit_)
        right = _arriving(np.bincount(cell, weights=row, minlength=length).reshape(shape), exit_)
        hits += right.reshape(right.shape + tail)
        spent += costs[exit_] * count.reshape(count.shape + tail)
    return hits, spent / ranks.images


def _arriving(table: Array, exit_: int) -> Array:
    """Histogram over `under` -> sums over the images that pass all earlier cuts and leave at this one."""
    for axis in range(table.ndim):
        if axis == exit_:  # leave under cut a: under > a
            kept = np.flip(np.cumsum(np.flip(table, axis), axis=axis), axis)
            table = np.take(kept, np.arange(1, table.shape[axis]), axis=axis)
        else:  # pass cut a: under <= a
            table = np.take(np.cumsum(table, axis=axis), np.arange(table.shape[axis] - 1), axis=axis)
    return table


def sweep(correct: Array, ranks: Ranks, costs: Array, budgets: Array, outer: Array) -> tuple[Array, Array]:
    """Three exits: the best of all pairs (one of `outer` at exit 0, any cut at exit 1), for every budget.

    Going up through exit 0's cuts, images join those that reach exit 1. Two
    arrays over exit 1's cuts are kept up to date: how many of the joined leave
    there, and how many more of them are then right than at exit 2. A budget
    asks for a least number to leave, so its cuts are a prefix, and the best of
    it a running maximum: O(N (U_1 + B)) for B budgets.

    Args:
      correct: bool `[3, N]`.
      ranks: of the scores.
      costs: `[3]` cumulative.
      budgets: `[B]` average costs.
      outer: ascending cuts of exit 0.

    Returns:
      cuts int64 `[B, 2]` and hits int64 `[B]`; hits are -1 where no pair keeps
      the budget. Of equals, the one with most images at exit 0, then at exit 1.
    """
    first, second = ranks.rank
    last = len(ranks.values[1])
    order = np.argsort(first, kind="stable")
    ends = np.searchsorted(first[order], outer)  # images that have joined at each outer cut
    gains = correct[1].astype(np.int32) - correct[2].astype(np.int32)
    leaving = np.zeros(last + 1, np.int32)  # minus the number: ascending, as searchsorted wants it
    gain = np.zeros(last + 1, np.int32)
    at_0 = np.concatenate([[0], np.cumsum(correct[0][order])])
    at_2 = np.concatenate([[0], np.cumsum(correct[2][order])])
    found, hits = np.zeros((len(budgets), 2), np.int64), np.full(len(budgets), -1)
    start = 0
    for cut, end in zip(outer, ends, strict=True):
        _join(leaving, gain, second[order[start:end]], gains[order[start:end]])
        start = end
        spent = (ranks.images - end) * costs[0] + end * costs[2]
        excess = (spent - ranks.images * budgets * (1 + SLACK)) / (costs[2] - costs[1])
        need = np.ceil(excess.clip(0, end + 1)).astype(np.int32)  # [B] must leave at exit 1
        reach = np.searchsorted(leaving, -need, side="right") - 1  # [B] last cut that lets so many leave
        tops, which = np.unique(reach, return_inverse=True)
        if tops[-1] < 0:
            continue
        # The running maximum at the budgets' last cuts only: a maximum per stretch between them.
        starts = np.maximum(np.concatenate([[0], tops[:-1] + 1]), 0)
        running = np.maximum.accumulate(np.maximum.reduceat(gain[: tops[-1] + 1], starts))
        value = np.where(reach < 0, -1, at_0[-1] - at_0[end] + at_2[end] + running[which])
        for budget in np.flatnonzero(value > hits):
            hits[budget] = value[budget]
            found[budget] = cut, int(np.argmax(gain[: reach[budget] + 1]))
    return found, hits


def _join(leaving: Array, gain: Array, second: Array, gains: Array) -> None:
    """Adds images of rank `second [n]` at exit 1: they leave there under every cut up to their rank."""
    if len(second) <= FEW:
        for rank, more in zip(second.tolist(), gains.tolist(), strict=True):
            leaving[: rank + 1] -= 1
            if more:
                gain[: rank + 1] += more
        return
    for total, weights in ((leaving, None), (gain, gains)):
        added = np.bincount(second, weights, minlength=len(total))
        summed = np.cumsum(added[::-1])[::-1].astype(np.int32)
        total += -summed if weights is None else summed


def zoom(
    correct: Array, ranks: Ranks, costs: Array, budget: float, start: Array, cells: int
) -> tuple[Array, int]:
    """Improves cuts for one budget by grids around them, until single steps help no more.

    All cuts move at once, which matters at a tight budget: one exit may let
    more images leave only if another lets fewer. Never worse than `start`.

    Args:
      correct, ranks, costs: as `grid`.
      budget: average cost.
      start: cuts `[E - 1]` that keep the budget.
      cells: combinations per grid, about.

    Returns:
      cuts `[E - 1]`, and how many combinations were tried.
    """
    tops = np.array([len(values) for values in ranks.values])
    side = max(1, (int(round(cells ** (1 / len(tops)), 6)) - 1) // 2)  # cuts on either side
    step = np.maximum(1, tops // (2 * side))
    current, tried, value = np.asarray(start), 0, None
    while True:
        moves = np.arange(-side, side + 1)
        cuts = [
            np.unique(np.clip(c + s * moves, 0, top)) for c, s, top in zip(current, step, tops, strict=True)
        ]
        hits, spent = grid(correct, ranks, costs, cuts)
        tried += hits.size
        index = int(best(hits.ravel(), spent.ravel(), np.array([budget]))[0])
        place = np.unravel_index(index, hits.shape)
        key = (hits[place], -spent[place])
        if value is None or key > value:
            improved = value is not None
            value = key
            current = np.array([row[i] for row, i in zip(cuts, place, strict=True)])
        else:
            improved = False
        if not improved:
            if (step == 1).all():
                return current, tried
            step = -(-step // 2)


def settle(correct: Array, ranks: Ranks, costs: Array, budget: float, start: Array, cells: int) -> Array:
    """Of the cuts around `start` with as many hits, those that would do best on other images.

    What a combination will be worth elsewhere is estimated by the mean hits of
    the combinations around it, each cut up to 1/20 of the images away. The hits
    stay what they are and the budget is kept; of equal means, the cheapest.

    Args:
      correct, ranks, costs, budget, start, cells: as `zoom`.

    Returns:
      cuts `[E - 1]`.
    """
    tops = np.array([len(values) for values in ranks.values])
    side = min((int(round(cells ** (1 / len(tops)), 6)) - 1) // 2, ranks.images // 5)
    near = min(-(-side // 3), ranks.images // 20)  # of which the mean is taken
    if near < 1:
        return np.asarray(start)
    cuts = [np.arange(max(0, c - side), min(top, c + side) + 1) for c, top in zip(start, tops, strict=True)]
    hits, spent = grid(correct, ranks, costs, cuts)
    reach = side - near  # beyond, the means lack neighbours
    allowed = spent <= budget * (1 + SLACK)
    for axis, (row, cut) in enumerate(zip(cuts, start, strict=True)):
        inside = np.abs(row - cut) <= reach
        allowed &= inside.reshape([-1 if a == axis else 1 for a in range(hits.ndim)])
    here = tuple(int(cut - row[0]) for row, cut in zip(cuts, start, strict=True))
    equal = np.flatnonzero(allowed & (hits == hits[here]))
    means = _mean_around(hits, near).ravel()[equal]
    equal = equal[means >= means.max() * (1 - SLACK)]
    place = np.unravel_index(equal[np.argmin(spent.ravel()[equal])], hits.shape)
    return np.array([row[i] for row, i in zip(cuts, place, strict=True)])


def _mean_around(values: Array, near: int) -> Array:
    """Mean over the box of `near` cells in every direction, cut off at the edges."""
    for axis, size in enumerate(values.shape):
        total = np.cumsum(values, axis=axis)
        total = np.concatenate([np.zeros_like(np.take(total, [0], axis)), total], axis=axis)
        low, high = np.maximum(np.arange(size) - near, 0), np.minimum(np.arange(size) + near + 1, size)
        count = (high - low).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
        values = (np.take(total, high, axis) - np.take(total, low, axis)) / count
    return values


def between(scores: Array, thresholds: Array) -> Array:
    """Thresholds `[E]` midway between the lowest score that leaves and the highest that stays.

    Every image of `scores [E, N]` leaves where it did. Elsewhere the last bits
    of a score differ (another batch size, another device), and an image whose
    score is the threshold itself would go either way.
    """
    limits = np.array(thresholds, dtype=scores.dtype)
    here = np.ones(scores.shape[1], dtype=bool)
    for exit_, row in enumerate(scores[:-1]):
        leaves = here & (row >= limits[exit_])
        here = here & ~leaves
        if leaves.any() and here.any():
            low, high = row[here].max(), row[leaves].min()
            middle = scores.dtype.type(low / 2 + high / 2)
            limits[exit_] = middle if middle > low else high  # neighbouring floats have none between them
    return limits
