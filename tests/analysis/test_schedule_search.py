"""The schedule search against all schedules there are."""

import itertools

import numpy as np
import pytest

from dyntoken.analysis import schedule_search as schedules

DEPTH, COUNTS = 5, (16, 10, 6)
COSTS = {16: 1.0, 10: 0.55, 6: 0.3}


def every():
    """All schedules of these counts."""
    for keeps in itertools.product(COUNTS, repeat=DEPTH):
        if list(keeps) == sorted(keeps, reverse=True):
            before = (16, *keeps[:-1])
            yield tuple((b, k) for b, (k, old) in enumerate(zip(keeps, before, strict=True)) if k != old)


def charged(path, errors):
    total, current = 0.0, 16
    for block, count in path:
        total += max(errors[block, count] - errors.get((block, current), 0.0), 0.0)
        current = count
    return total


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("budget", [0.5, 0.7, 0.9])
def test_nothing_is_better(inside, budget):
    rng = np.random.default_rng(3)
    errors = {
        (b, c): float(rng.uniform(0.5, 1) * (16 - c) / (b + 1)) for b in range(DEPTH) for c in COUNTS[1:]
    }
    found = schedules.search(DEPTH, inside, errors, COSTS, budget)
    options = []
    for path in every():
        at, keep = zip(*path, strict=True) if path else ((), ())
        cost = schedules.total_cost(DEPTH, at, keep, inside, COSTS)
        if cost <= budget:
            options.append(charged(path, errors))
    best = min(options)
    path = tuple(zip(found.at, found.keep, strict=True))
    assert charged(path, errors) == pytest.approx(found.error)
    assert found.cost <= budget + 1e-6
    # Costs are counted in 1 / STEPS: nearly equal ones may be taken for equal.
    assert found.error == pytest.approx(best, rel=0.02)


def test_the_number_of_sites_is_bounded_and_a_budget_may_be_out_of_reach():
    errors = {(b, c): float(16 - c) / (b + 1) for b in range(DEPTH) for c in COUNTS[1:]}
    assert len(schedules.search(DEPTH, True, errors, COSTS, 0.6, sites=1).at) == 1
    assert schedules.search(DEPTH, True, errors, COSTS, 0.2) is None


def test_costs_of_blocks_from_costs_of_models():
    # Site 1 of 4 inside: 1 1/3 blocks on all rows, 2 2/3 on half of them at half the cost.
    costs = schedules.block_costs(4, 1, True, {8: (4 / 3 + 8 / 3 * 0.5) / 4}, 16)
    assert costs == pytest.approx({8: 0.5, 16: 1.0})
    assert schedules.total_cost(4, (1,), (8,), True, costs) == pytest.approx((4 / 3 + 8 / 3 * 0.5) / 4)
    assert schedules.total_cost(4, (1,), (12,), False, costs) == pytest.approx((1 + 3 * 0.75) / 4)
