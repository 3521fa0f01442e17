"""Exit rules, who leaves where, and the curves."""

from __future__ import annotations

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from dyntoken.eval import exits
from dyntoken.registry import UnknownNameError

# softmax: [1/2, 1/4, 1/4] and [0.9, 0.1, 0]
LOGITS = np.log(np.array([[[2.0, 1.0, 1.0], [9.0, 1.0, 1e-30]]], np.float32))
CORRECT = np.array([[1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
SCORES = np.array([[0.9, 0.5, 0.5, 0.2], [0.1, 0.6, 0.7, 0.8], [0.3, 0.3, 0.3, 0.3]], np.float32)
COSTS = [1.0, 2.0, 4.0]


def test_rules_by_hand():
    np.testing.assert_allclose(exits.score("confidence", LOGITS), [[0.5, 0.9]], rtol=1e-6)
    np.testing.assert_allclose(exits.score("margin", LOGITS), [[0.25, 0.8]], rtol=1e-6)
    nats = [[-1.5 * np.log(2), 0.9 * np.log(0.9) + 0.1 * np.log(0.1)]]
    np.testing.assert_allclose(exits.score("entropy", LOGITS), nats, rtol=1e-6)


def test_extreme_logits_stay_finite():
    logits = np.array([[[1e4, -1e4], [0.0, -np.inf]]], np.float32)
    for rule in ("confidence", "margin"):
        np.testing.assert_array_equal(exits.score(rule, logits), [[1.0, 1.0]])
    np.testing.assert_array_equal(exits.score("entropy", logits), [[0.0, 0.0]])


def test_half_precision_logits_are_scored_in_float32():
    scores = exits.score("confidence", np.array([[[1.0, 0.5]]], np.float16))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [[1 / (1 + np.exp(-0.5))]], rtol=1e-6)


def test_random_is_seeded_and_ignores_the_logits():
    logits = np.zeros((3, 1000, 2), np.float32)
    one, other = exits.score("random", logits, seed=5), exits.score("random", logits + 1, seed=5)
    np.testing.assert_array_equal(one, other)
    assert one.shape == (3, 1000)
    assert (exits.score("random", logits, seed=6) != one).mean() > 0.99
    assert abs(one.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(one)[0, 1]) < 0.1  # exits draw independently


@hypothesis.given(
    hnp.arrays(np.float64, (2, 5, 4), elements=st.floats(-30, 30)), st.sampled_from(sorted(exits.RULES))
)
def test_rules_are_bounded_and_blind_to_a_shift_and_an_order_of_classes(logits, rule):
    scores = exits.score(rule, logits)
    low = {"entropy": -np.log(4) - 1e-9, "confidence": 0.25 - 1e-9}.get(rule, 0.0)
    assert scores.shape == (2, 5)
    assert (scores >= low).all()
    assert (scores <= 1).all()
    np.testing.assert_allclose(exits.score(rule, logits[..., ::-1] + 3.0), scores, atol=1e-9)


def test_correct_of_compares_each_exits_largest_logit():
    logits = np.array([[[0, 1], [1, 0]], [[1, 0], [1, 0]]], np.float32)
    np.testing.assert_array_equal(exits.correct_of(logits, [1, 1]), [[True, False], [False, False]])


def test_an_image_at_the_threshold_leaves_and_so_do_ties():
    np.testing.assert_array_equal(exits.exit_of(SCORES, [0.5, 0.8, 0.0]), [0, 0, 0, 1])
    above = np.nextafter(np.float32(0.5), np.float32(1))
    np.testing.assert_array_equal(exits.exit_of(SCORES, [above, 0.8, 0.0]), [0, 2, 2, 1])


@pytest.mark.parametrize("last", [exits.ALWAYS, 0.0, 0.99, exits.NEVER])
def test_the_last_exit_takes_whoever_is_left(last):
    np.testing.assert_array_equal(exits.exit_of(SCORES, [exits.NEVER, exits.NEVER, last]), [2, 2, 2, 2])


def test_an_earlier_exit_goes_first():
    """Image 0 is sure at exit 0 and unsure at exit 1; image 3 the other way round."""
    np.testing.assert_array_equal(exits.exit_of(SCORES, [0.9, 0.6, exits.ALWAYS]), [0, 1, 1, 1])


def test_thresholds_are_compared_in_the_dtype_of_the_scores():
    """float32(0.9) is below the double 0.9, yet a threshold of 0.9 means it."""
    assert float(SCORES[0, 0]) < 0.9
    assert exits.exit_of(SCORES, [0.9, 2, 0])[0] == 0
    assert exits.exit_of(SCORES, np.float64([1e300, 2, 0]))[0] == 2


def test_evaluate_by_hand():
    result = exits.evaluate(CORRECT, SCORES, [0.9, 0.7, exits.ALWAYS], COSTS)
    np.testing.assert_array_equal(result.counts, [1, 2, 1])  # images 0 | 2, 3 | 1
    np.testing.assert_array_equal(result.correct, [1, 0, 1])
    assert result.accuracy == 0.5
    assert result.cost == (1 + 2 * 2 + 4) / 4


@hypothesis.given(st.data())
def test_evaluate_is_what_exit_of_says(data):
    count, images = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    tenths = st.integers(0, 10).map(lambda n: n / 10)  # ties are common
    scores = data.draw(hnp.arrays(np.float32, (count, images), elements=tenths))
    correct = data.draw(hnp.arrays(bool, (count, images)))
    limits = data.draw(hnp.arrays(np.float32, count, elements=tenths))
    costs = np.arange(1.0, count + 1) ** 2
    taken = [
        next((k for k in range(count - 1) if scores[k, i] >= limits[k]), count - 1) for i in range(images)
    ]
    result = exits.evaluate(correct, scores, limits, costs)
    np.testing.assert_array_equal(exits.exit_of(scores, limits), taken)
    np.testing.assert_array_equal(result.counts, np.bincount(taken, minlength=count))
    assert result.accuracy == pytest.approx(np.mean([correct[k, i] for i, k in enumerate(taken)]))
    assert result.cost == pytest.approx(np.mean([costs[k] for k in taken]))


def test_anytime_curve_is_each_exit_alone():
    points = exits.anytime(CORRECT, COSTS)
    assert [point.accuracy for point in points] == [0.5, 0.5, 0.75]
    assert [point.cost for point in points] == COSTS
    np.testing.assert_array_equal([point.counts for point in points], [[4, 0, 0], [0, 4, 0], [0, 0, 4]])


@pytest.mark.parametrize(
    ("limits", "accuracy", "cost", "counts"),
    [
        ([exits.NEVER, exits.NEVER, 0.0], 0.75, 4.0, [0, 0, 4]),
        ([0.9, 0.7, 0.0], 0.5, 2.25, [1, 2, 1]),
        ([0.0, 0.0, 0.0], 0.5, 1.0, [4, 0, 0]),
    ],
)
def test_points_of_a_budgeted_curve(limits, accuracy, cost, counts):
    point = exits.evaluate(CORRECT, SCORES, limits, COSTS)
    assert (point.accuracy, point.cost, point.counts.tolist()) == (accuracy, cost, counts)
    assert point.shares.tolist() == [count / 4 for count in counts]
    assert point.error == np.sqrt(accuracy * (1 - accuracy) / 4)


def _evaluate(**changed):
    given = {"correct": CORRECT, "scores": SCORES, "thresholds": [0.5, 0.5, 0.5], "costs": COSTS}
    return exits.evaluate(**(given | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"thresholds": [0.5, 0.5]}, r"3 exits need 3 thresholds, got shape \(2,\)"),
        ({"thresholds": [[0.5, 0.5, 0.5]]}, r"got shape \(1, 3\)"),
        ({"thresholds": [0.5, np.nan, 0.5]}, "threshold 1 is NaN"),
        ({"costs": [1.0, 2.0]}, "3 exits need 3 costs"),
        ({"costs": [1.0, 2.0, 2.0]}, "strictly increasing, got 1, 2, 2"),
        ({"costs": [3.0, 2.0, 4.0]}, "strictly increasing, got 3, 2, 4"),
        ({"costs": [0.0, 2.0, 4.0]}, "positive"),
        ({"costs": [1.0, np.nan, 4.0]}, "strictly increasing"),
        ({"correct": CORRECT[:2]}, r"correct \(2, 4\) and scores \(3, 4\) differ"),
        ({"correct": CORRECT[0]}, r"correct must be \[exits, images\]"),
        ({"correct": CORRECT * 2}, "True or False"),
        ({"scores": SCORES[0]}, r"scores must be \[exits, images\], got shape \(4,\)"),
        ({"scores": SCORES[:, :0]}, r"got shape \(3, 0\)"),
        ({"scores": np.where(np.isclose(SCORES, 0.7), np.nan, SCORES)}, "NaN .first at exit 1, image 2"),
        ({"scores": SCORES * 1e9}, "must lie within ±1e"),
    ],
)
def test_one_clear_error_each(changed, message):
    with pytest.raises(ValueError, match=message) as error:
        _evaluate(**changed)
    assert "\n" not in str(error.value)


def test_errors_of_rules_and_labels():
    with pytest.raises(ValueError, match=r"\[exits, images, classes\], got shape \(1, 3\)"):
        exits.score("confidence", LOGITS[:, 0])
    with pytest.raises(ValueError, match="NaN"):
        exits.score("confidence", LOGITS * np.nan)
    with pytest.raises(ValueError, match="at least two classes"):
        exits.score("margin", LOGITS[..., :1])
    with pytest.raises(ValueError, match="one per image"):
        exits.correct_of(LOGITS, [0])
    with pytest.raises(UnknownNameError, match="did you mean confidence"):
        exits.score("confidense", LOGITS)
