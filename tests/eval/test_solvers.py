"""Threshold solvers: the released search, the genetic one, and the exact one above both."""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from dyntoken.eval import exits, solvers, threshold_search
from dyntoken.eval.exits import ALWAYS, NEVER
from tests.eval.made import budgets_of, cascade

EPS = 1e-9

# The exact search against every combination


def brute(correct, scores, costs, budget):
    """Best accuracy over every combination of calibration scores, never and always."""
    choices = [np.concatenate([np.unique(row), [NEVER]]) for row in scores[:-1]]
    best = 0.0
    for limits in itertools.product(*choices):
        point = exits.evaluate(correct, scores, [*limits, ALWAYS], costs)
        if point.cost <= budget * (1 + EPS):
            best = max(best, point.accuracy)
    return best


@st.composite
def calibrations(draw, exits_, images):
    count, number = draw(st.integers(*exits_)), draw(st.integers(1, images))
    scores = draw(hnp.arrays(np.float32, (count, number), elements=st.integers(0, 5)))
    correct = draw(hnp.arrays(bool, (count, number)))
    costs = np.cumsum(draw(hnp.arrays(np.float64, count, elements=st.integers(1, 9))))
    share = draw(st.integers(0, 20)) / 20
    return correct, scores, costs, costs[0] + share * (costs[-1] - costs[0])


@hypothesis.given(calibrations((2, 4), 7))
def test_optimal_equals_brute_force(calibration):
    correct, scores, costs, budget = calibration
    (found,) = solvers.optimal(correct, scores, costs, budget)
    assert found.resolution == 0.0
    assert found.cost <= budget * (1 + EPS)
    assert found.accuracy == pytest.approx(brute(correct, scores, costs, budget))


@hypothesis.given(calibrations((2, 5), 40), st.integers(0, 3))
def test_optimal_is_never_below_the_others(calibration, seed):
    correct, scores, costs, budget = calibration
    (ours,) = solvers.optimal(correct, scores, costs, budget)
    (released,) = solvers.geometric(correct, scores, costs, budget)
    (evolved,) = solvers.genetic(correct, scores, costs, budget, seed=seed, population=8, generations=4)
    assert ours.accuracy >= released.accuracy - EPS
    if ours.resolution == 0:
        assert ours.accuracy >= evolved.accuracy - EPS
    (ours,) = solvers.optimal(correct, scores, costs, budget, levels=2, starts=[evolved.thresholds])
    assert ours.accuracy >= max(released.accuracy, evolved.accuracy) - EPS
    for solution in (ours, released, evolved):
        assert solution.cost <= budget * (1 + EPS)


@pytest.mark.thorough
@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_optimal_is_never_below_the_others_on_a_cascade(count):
    correct, scores, costs = cascade(count, 600)
    budgets = budgets_of(costs, 5)
    released = solvers.geometric(correct, scores, costs, budgets)
    evolved = solvers.genetic(correct, scores, costs, budgets, generations=15)
    ours = solvers.optimal(
        correct, scores, costs, budgets, starts=[solution.thresholds for solution in evolved]
    )
    assert (ours[0].resolution == 0) == (count <= 3)
    for mine, his, hers in zip(ours, released, evolved, strict=True):
        assert mine.accuracy >= max(his.accuracy, hers.accuracy) - EPS
        assert max(mine.cost, his.cost, hers.cost) <= mine.budget * (1 + EPS)
    # The first budget leaves no choice; between the ends the exact search gains.
    assert ours[0].counts.tolist() == [600] + [0] * (count - 1)
    assert sum(mine.accuracy - his.accuracy for mine, his in zip(ours, released, strict=True)) > 0.02


@pytest.mark.parametrize("count", [2, 3])
def test_every_point_of_the_released_sweep_is_met_at_its_own_cost(count):
    """A budget that is an average cost itself is met in spite of rounding."""
    correct, scores, costs = cascade(count, 300, seed=4)
    costs = costs / 7  # not exact in binary
    curve = [exits.evaluate(correct, scores, row, costs) for row in solvers.geometric_sweep(scores)]
    ours = solvers.optimal(correct, scores, costs, [point.cost for point in curve])
    assert all(mine.accuracy >= his.accuracy - EPS for mine, his in zip(ours, curve, strict=True))


def test_accuracy_grows_with_the_budget_and_budgets_may_come_in_any_order():
    correct, scores, costs = cascade(3, 500)
    budgets = budgets_of(costs, 12)
    ours = solvers.optimal(correct, scores, costs, budgets)
    accuracy = [solution.accuracy for solution in ours]
    assert (np.diff(accuracy) >= 0).all()
    again = solvers.optimal(correct, scores, costs, budgets[::-1])[::-1]
    assert [solution.thresholds.tolist() for solution in ours] == [s.thresholds.tolist() for s in again]
    alone = [solvers.optimal(correct, scores, costs, budget)[0] for budget in budgets]
    assert accuracy == [solution.accuracy for solution in alone]


def test_coarse_levels_are_refined_to_single_images():
    """Eight levels of exit 0 only; the grids around the best of them find the optimum of this cascade."""
    correct, scores, costs = cascade(3, 500)
    exact = solvers.optimal(correct, scores, costs, budgets_of(costs))
    coarse = solvers.optimal(correct, scores, costs, budgets_of(costs), levels=8)
    assert exact[0].resolution == 0.0
    assert 1 / 8 < coarse[0].resolution < 1 / 6
    assert exact[0].evaluations == 501 * 501
    short = [one.accuracy - other.accuracy for one, other in zip(exact, coarse, strict=True)]
    assert min(short) >= 0
    assert max(short) <= 0.004  # two images of 500


def test_images_joining_in_bulk_and_one_by_one_agree():
    """A tie of more than 16 images at exit 0 takes the other path."""
    correct, scores, costs = cascade(3, 200)
    scores[0] = np.round(scores[0] * 4) / 4
    assert np.unique(scores[0], return_counts=True)[1].max() > threshold_search.FEW
    ranks = threshold_search.Ranks(scores)
    hits, spent = threshold_search.grid(correct, ranks, costs, [np.arange(len(v) + 1) for v in ranks.values])
    budgets = budgets_of(costs)
    chosen = threshold_search.best(hits.ravel(), spent.ravel(), budgets)
    ours = solvers.optimal(correct, scores, costs, budgets)
    assert [s.accuracy for s in ours] == pytest.approx((hits.ravel()[chosen] / 200).tolist())


def test_sweep_equals_the_full_grid_at_every_cost_that_occurs():
    """Budgets at which one image more or less decides, in units that are not exact in binary."""
    correct, scores, costs = cascade(3, 40, seed=1)
    costs = costs / 7
    ranks = threshold_search.Ranks(scores)
    hits, spent = threshold_search.grid(correct, ranks, costs, [np.arange(41), np.arange(41)])
    budgets = np.unique(spent.round(12))
    assert len(budgets) > 100
    expected = hits.ravel()[threshold_search.best(hits.ravel(), spent.ravel(), budgets)]
    _, found = threshold_search.exact_three_exits(correct, ranks, costs, budgets, np.arange(41))
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) > 8


def test_grid_equals_evaluate():
    correct, scores, costs = cascade(4, 60)
    ranks = threshold_search.Ranks(scores)
    cuts = [ranks.levels(k, 5) for k in range(3)]
    hits, spent = threshold_search.grid(correct, ranks, costs, cuts)
    assert hits.shape == (5, 5, 5)
    for place in [(0, 2, 2), (4, 0, 3), (4, 4, 4), (1, 3, 2)]:
        limits = ranks.thresholds([row[i] for row, i in zip(cuts, place, strict=True)])
        point = exits.evaluate(correct, scores, limits, costs)
        assert hits[place] == point.correct.sum()
        assert spent[place] == pytest.approx(point.cost)


def test_thresholds_lie_midway_between_the_last_to_leave_and_the_first_to_stay():
    scores = np.float32([[9, 7, 4, 2, 1], [0, 0, 8, 6, 3], [0] * 5])
    found = threshold_search.midpoints(scores, np.float32([7, 6, ALWAYS]))
    np.testing.assert_array_equal(found, np.float32([5.5, 4.5, ALWAYS]))
    assert found.dtype == np.float32
    # Image 1 has left when exit 1 decides: its 5 is no reason to lift the threshold.
    scores[1, 1] = 5
    np.testing.assert_array_equal(
        threshold_search.midpoints(scores, np.float32([7, 6, ALWAYS]))[:2], [5.5, 4.5]
    )


def test_no_number_lies_between_neighbouring_floats():
    low = np.float32(0.5)
    high = np.nextafter(low, np.float32(1))
    scores = np.array([[low, high], [0, 0]], np.float32)
    np.testing.assert_array_equal(threshold_search.midpoints(scores, [high, ALWAYS])[0], high)
    np.testing.assert_array_equal(
        exits.exit_of(scores, threshold_search.midpoints(scores, [high, ALWAYS])), [1, 0]
    )


@pytest.mark.parametrize(
    "limits", [[NEVER, NEVER, ALWAYS], [ALWAYS, ALWAYS, ALWAYS], [NEVER, ALWAYS, ALWAYS]]
)
def test_never_and_always_stay(limits):
    _, scores, _ = cascade(3, 50)
    np.testing.assert_array_equal(threshold_search.midpoints(scores, limits), np.float32(limits))


@hypothesis.given(calibrations((2, 4), 30), st.lists(st.integers(0, 6), min_size=4, max_size=4))
def test_moving_thresholds_moves_no_image(calibration, limits):
    scores = calibration[1]
    limits = np.float32(limits[: len(scores)])
    moved = threshold_search.midpoints(scores, limits)
    np.testing.assert_array_equal(exits.exit_of(scores, moved), exits.exit_of(scores, limits))


@pytest.mark.parametrize("solver", ["genetic", "optimal"])
def test_noise_in_the_last_bits_moves_no_image(solver):
    """The thresholds of the released code are scores themselves: there an image flips."""
    correct, scores, costs = cascade(3, 300)
    scores = np.float32(np.round(scores, 3))
    draw = np.random.default_rng(0)
    noisy = scores * (1 + 2e-7 * draw.choice([-1, 1], scores.shape)).astype(np.float32)
    more = {"generations": 5} if solver == "genetic" else {}
    (found,) = solvers.SOLVERS[solver](correct, scores, costs, 3.0, **more)
    np.testing.assert_array_equal(
        exits.exit_of(noisy, found.thresholds), exits.exit_of(scores, found.thresholds)
    )
    (released,) = solvers.geometric(correct, scores, costs, 3.0)
    assert (exits.exit_of(noisy, released.thresholds) != exits.exit_of(scores, released.thresholds)).any()


def test_of_equals_the_cheapest():
    """Two exits, 200 images: letting 100 to 110 of the surest leave is equally right, fewer or more is worse."""
    images, costs = 200, np.array([1.0, 2.0])
    scores = np.stack([np.arange(images, dtype=np.float32), np.zeros(images, np.float32)])
    gain = np.repeat([0, 1, 0, -1], [80, 20, 10, 90])  # right at exit 0 minus right at exit 1, surest first
    correct = np.stack([gain[::-1] == 1, gain[::-1] == -1])
    (found,) = solvers.optimal(correct, scores, costs, 2.0)
    assert (found.counts.tolist(), found.accuracy) == ([110, 90], 0.55)
    assert found.thresholds[0] == 89.5


def test_a_cascade_that_only_gets_worse_stops_at_once():
    """All right at exit 0, all wrong later: a large budget is not spent."""
    correct = np.array([[True] * 20, [False] * 20, [False] * 20])
    scores = np.random.default_rng(0).random((3, 20))
    (ours,) = solvers.optimal(correct, scores, [1.0, 2.0, 3.0], 3.0)
    assert (ours.accuracy, ours.cost, ours.counts.tolist()) == (1.0, 1.0, [20, 0, 0])


# The genetic search


def test_genetic_is_reproducible_and_reports_its_effort():
    correct, scores, costs = cascade(3, 300)
    one, other = (solvers.genetic(correct, scores, costs, [2.5, 4.0], seed=3) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.thresholds, b.thresholds)
        assert a.evaluations == b.evaluations
        assert 100 < a.evaluations <= 50 * 61
        assert a.seconds > 0
    seeds = {solvers.genetic(correct, scores, costs, 2.5, seed=s)[0].evaluations for s in range(4)}
    assert len(seeds) > 1


def test_genetic_comes_close_to_the_optimum():
    correct, scores, costs = cascade(3, 600)
    budgets = budgets_of(costs)[1:-1]
    evolved = solvers.genetic(correct, scores, costs, budgets)
    ours = solvers.optimal(correct, scores, costs, budgets)
    assert all(hers.accuracy > mine.accuracy - 0.01 for hers, mine in zip(evolved, ours, strict=True))


# Errors


@pytest.mark.parametrize("solver", sorted(solvers.SOLVERS))
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"budgets": 0.9}, "budget 0.9 is below the first exit, which every image pays: 1"),
        ({"budgets": [2.0, np.nan]}, "NaN"),
        ({"budgets": []}, "one number or a list"),
        ({"costs": [1.0, 1.0, 3.0]}, "strictly increasing, got 1, 1, 3"),
        ({"costs": [1.0, 2.0]}, "3 exits need 3 costs"),
        ({"correct": np.ones((3, 49), bool)}, r"correct \(3, 49\) and scores \(3, 50\) differ"),
        ({"scores": np.full((3, 50), np.nan)}, "scores are NaN"),
        ({"correct": np.ones((1, 5), bool), "scores": np.ones((1, 5)), "costs": [1.0]}, "at least two exits"),
    ],
)
def test_one_clear_error_each(solver, changed, message):
    correct, scores, costs = cascade(3, 50)
    given = {"correct": correct, "scores": scores, "costs": costs, "budgets": 2.0} | changed
    with pytest.raises(ValueError, match=message) as error:
        solvers.SOLVERS[solver](**given)
    assert "\n" not in str(error.value)


def test_errors_of_single_solvers():
    correct, scores, costs = cascade(3, 50)
    with pytest.raises(ValueError, match="levels must be at least 2"):
        solvers.optimal(correct, scores, costs, 2.0, levels=1)
    with pytest.raises(ValueError, match=r"3 exits need 3 thresholds, got shape \(2,\)"):
        solvers.optimal(correct, scores, costs, 2.0, starts=[[0.5, 0.5]])
    with pytest.raises(ValueError, match="5 individuals and 1 generation at least, got 3 and 5"):
        solvers.genetic(correct, scores, costs, 2.0, population=3, generations=5)
    with pytest.raises(ValueError, match="3 exits need as many shares"):
        solvers.find_threshold(scores, [0.5, 0.5])
    with pytest.raises(ValueError, match="positive step"):
        solvers.geometric_shares(0, 3)
    with pytest.raises(ValueError, match="up to 9 exits, got 10"):
        solvers.optimal(*cascade(10, 20), 2.0)
