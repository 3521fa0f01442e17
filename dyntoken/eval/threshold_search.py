"""The best thresholds under a budget: searches over ranks, for all budgets at once.

What counts of a threshold is which of an exit's calibration scores it lets
leave, so exit k has one candidate ("cut") per distinct score, and one for
none: cut i lets the scores of rank >= i leave. Searching cuts therefore
loses nothing. The thresholds of several exits do not separate (which images
arrive at an exit depends on every earlier threshold): the searches are joint.

* `grid`: every combination of given cuts, by cumulative sums over the joint
  histogram of ranks: O(N E + product of the numbers of cuts).
* `exact_three_exits`: every combination of cuts without enumerating them:
  prefix sums over the second exit's ranks, updated as images join.
* `refine`: `grid` around a known combination, closer and closer.

`midpoints` then moves thresholds off the scores themselves.
"""

from __future__ import annotations

import math
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
      images: N.
      combinations: how many sets of thresholds differ on the calibration set, at most.
    """

    def __init__(self, scores: Array):
        pairs = [np.unique(row, return_inverse=True) for row in scores[:-1]]
        self.images, self.dtype = scores.shape[1], scores.dtype
        self.values = [values for values, _ in pairs]
        self.rank = np.stack([rank for _, rank in pairs])
        self.combinations = math.prod(len(values) + 1 for values in self.values)

    def cuts(self, thresholds: Array) -> Array:
        """The cuts `[E - 1]` that thresholds `[E]` are equal to on the calibration set."""
        pairs = zip(self.values, thresholds, strict=False)  # the last exit takes every image
        return np.array([np.searchsorted(values, limit) for values, limit in pairs], dtype=np.int64)

    def thresholds(self, cuts: Sequence[int] | Array) -> Array:
        """Thresholds `[E]` of cuts `[E - 1]`: calibration scores in their own dtype, never, or always."""
        limits = []
        for values, cut in zip(self.values, cuts, strict=True):
            # Cut 0 is not "above the lowest score": every image leaves, on other sets too.
            limits.append(ALWAYS if cut == 0 else NEVER if cut == len(values) else values[cut])
        return np.array([*limits, ALWAYS], dtype=self.dtype)

    def levels(self, exit_: int, count: int) -> Array:
        """At most `count` cuts of one exit, with about as many images between each two; both ends are in."""
        last = len(self.values[exit_])
        if last + 1 <= count:
            return np.arange(last + 1)
        return np.unique(np.searchsorted(self._below(exit_), np.linspace(0, self.images, count)))

    def gap(self, exit_: int, cuts: Array) -> float:
        """Largest share of images between two neighbouring cuts that have other cuts between them."""
        skipped = np.diff(cuts) > 1
        return float(np.diff(self._below(exit_)[cuts])[skipped].max(initial=0)) / self.images

    def _below(self, exit_: int) -> Array:
        """Images below each cut, `[U_k + 1]`."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.rank[exit_]))])


def best(hits: Array, costs: Array, budgets: Array) -> Array:
    """For every budget `[B]` the candidate with most hits `[M]` whose average cost `[M]` keeps it, int64 `[B]`.

    The cheapest of equals; -1 where no candidate is cheap enough.
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
    """Hits and average cost, float64 `[g_0, ..., g_{E-2}]`, of every combination of ascending cuts `[g_k]`.

    An image with score rank r leaves at cut i if r >= i. Exit k's share of a
    combination depends on the cuts 0..k only: one table of k + 1 dimensions
    per exit, summed by broadcasting.
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


def exact_three_exits(
    correct: Array, ranks: Ranks, costs: Array, budgets: Array, outer: Array
) -> tuple[Array, Array]:
    """The best of all pairs (one of `outer` at exit 0, any cut at exit 1), for every budget.

    Going up through exit 0's cuts, images join those that reach exit 1. Two
    arrays over exit 1's cuts are kept up to date: how many of the joined leave
    there, and how many more of them are then right than at exit 2. A budget
    asks for a least number to leave, so its cuts are a prefix, and the best of
    it a running maximum: O(N (U_1 + B)) for B budgets.

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
    chosen, hits = np.zeros((len(budgets), 2), np.int64), np.full(len(budgets), -1)
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
            chosen[budget] = cut, int(np.argmax(gain[: reach[budget] + 1]))
    return chosen, hits


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


def refine(
    correct: Array, ranks: Ranks, costs: Array, budget: Array, start: Array, cells: int
) -> tuple[Array, int]:
    """Improves cuts for one budget by grids around them, until single steps help no more.

    All cuts move at once, which matters at a tight budget: one exit may let
    more images leave only if another lets fewer. Never worse than `start`, cuts
    `[E - 1]` that keep the budget `[1]`; about `cells` combinations per grid.

    Returns:
      cuts `[E - 1]`, and how many combinations were tried.
    """
    tops = np.array([len(values) for values in ranks.values])
    side = max(1, (int(round(cells ** (1 / len(tops)), 6)) - 1) // 2)  # cuts on either side
    step, current, tried, value = np.maximum(1, tops // (2 * side)), start, 0, None
    while True:
        moves = [c + s * np.arange(-side, side + 1) for c, s in zip(current, step, strict=True)]
        cuts = [np.unique(np.clip(row, 0, top)) for row, top in zip(moves, tops, strict=True)]
        hits, spent = grid(correct, ranks, costs, cuts)
        tried += hits.size
        place = np.unravel_index(int(best(hits.ravel(), spent.ravel(), budget)[0]), hits.shape)
        found = (hits[place], -spent[place])
        if value is None or found > value:
            improved, value = value is not None, found
            current = np.array([row[i] for row, i in zip(cuts, place, strict=True)])
        else:
            improved = False
        if not improved:
            if (step == 1).all():
                return current, tried
            step = -(-step // 2)


def midpoints(scores: Array, thresholds: Array) -> Array:
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
