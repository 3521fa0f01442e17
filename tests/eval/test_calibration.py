"""Halves, points and comparisons, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dyntoken.eval import calibration, exits
from dyntoken.eval.calibration import CALIBRATION, HELD_OUT, Half
from dyntoken.eval.exits import Operating

COSTS = np.array([1.0, 3.0])
HALF = Half(
    HELD_OUT,
    correct=np.array([[1, 0, 1, 0], [1, 1, 0, 0]], bool),
    scores=np.array([[4, 3, 2, 1], [0, 0, 0, 0]], np.float32),
)


def solution(limit, budget=2.0, solver="optimal"):
    limits = np.array([limit, exits.ALWAYS])
    return Operating(limits, 0.0, 0.0, np.zeros(2, int), np.zeros(2, int), budget, solver)


def test_even_images_calibrate_and_odd_ones_judge():
    logits = np.zeros((2, 5, 3), np.float32)
    logits[0, :, 0] = [1, 2, 3, 4, 5]
    seen, unseen = calibration.halves(logits, np.array([0, 0, 1, 0, 0]), "confidence")
    assert (seen.name, seen.images, unseen.name, unseen.images) == (CALIBRATION, 3, HELD_OUT, 2)
    e = np.exp(np.array([1.0, 3.0, 5.0]))
    np.testing.assert_allclose(seen.scores[0], e / (e + 2), rtol=1e-6)
    np.testing.assert_array_equal(seen.correct[0], [True, False, True])
    np.testing.assert_array_equal(unseen.correct[0], [True, True])


def test_points_by_hand():
    one, other = exits.anytime(HALF.correct, COSTS)
    assert (one.solver, one.budget) == (None, None)
    assert (one.accuracy, one.cost, one.shares.tolist()) == (0.5, 1.0, [1.0, 0.0])
    assert one.error == 0.25  # sqrt(0.5 * 0.5 / 4)
    assert (other.cost, other.shares.tolist()) == (3.0, [0.0, 1.0])
    point = HALF.judge(solution(3.5), COSTS)
    assert (point.solver, point.budget) == ("optimal", 2.0)
    assert (point.accuracy, point.cost, point.shares.tolist()) == (0.5, 2.5, [0.25, 0.75])


def test_a_comparison_by_hand():
    """Right are images 0, 1 and 0, 2; then 0, 1 and 0, 1: once a tie, once a tie in number only."""
    np.testing.assert_array_equal(HALF.right([4.0, 0]), [True, True, False, False])
    np.testing.assert_array_equal(HALF.right([0.0, 0]), [True, False, True, False])
    found = calibration.compare(HALF, [solution(4.0), solution(4.0)], [solution(0.0), solution(4.0)])
    assert (found["budgets"], found["above"], found["difference"]) == (2, 2, 0.0)
    # Differences per image, mean of both budgets: 0, 1/2, -1/2, 0.
    assert found["error"] == pytest.approx(np.sqrt((0.25 + 0.25) / 3) / 2)
    assert found["shortfall"] == 0.0


def test_a_shortfall_is_in_standard_errors():
    half = Half(CALIBRATION, np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool), HALF.scores)
    found = calibration.compare(half, [solution(9.0)], [solution(0.0)])  # 2 of 4 against 4 of 4
    assert (found["above"], found["difference"]) == (0, -0.5)
    assert found["shortfall"] == pytest.approx(0.5 / 0.25)
    found = calibration.compare(half, [solution(0.0)], [solution(9.0)])
    assert (found["above"], found["difference"], found["shortfall"]) == (1, 0.5, 0.0)


def test_optimal_is_solved_last_and_starts_from_the_genetic_solution():
    draw = np.random.default_rng(0)
    half = Half(CALIBRATION, draw.random((4, 400)) < 0.6, draw.random((4, 400)))  # four exits: not exact
    costs = np.array([1.0, 2.0, 3.0, 4.0])
    found = calibration.solve(["optimal", "genetic"], half, costs, [2.0, 3.0], seed=3)
    assert list(found) == ["genetic", "optimal"]
    assert found["optimal"][0].resolution > 0
    for mine, hers in zip(found["optimal"], found["genetic"], strict=True):
        assert mine.accuracy >= hers.accuracy
    again = calibration.solve(["genetic"], half, costs, [2.0, 3.0], seed=4)
    assert any(
        (a.thresholds != b.thresholds).any() for a, b in zip(found["genetic"], again["genetic"], strict=True)
    )


def test_one_image_is_no_split():
    with pytest.raises(ValueError, match="one image makes no two halves"):
        calibration.halves(np.zeros((2, 1, 3)), [0], "confidence")
