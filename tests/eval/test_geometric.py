"""The released quantile search, to the bit."""

from __future__ import annotations

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from dyntoken.eval import exits, solvers
from dyntoken.eval.exits import ALWAYS, NEVER
from tests.eval.made import cascade

EPS = 1e-9

# What the released code found on nine images of a made-up cascade.
RELEASED_SCORES = np.array(
    [
        [
            0.49862337,
            0.9846939,
            0.50277096,
            0.740141,
            0.9596587,
            0.99774736,
            0.94118553,
            0.47966072,
            0.7287024,
        ],
        [
            0.68927634,
            0.99934083,
            0.6906925,
            0.36343965,
            0.9745116,
            0.9984989,
            0.8737558,
            0.94520664,
            0.9389224,
        ],
        [
            0.53893286,
            0.9999249,
            0.7879617,
            0.68627006,
            0.9855112,
            0.9075689,
            0.7936973,
            0.99785393,
            0.8082767,
        ],
    ],
    np.float32,
)
RELEASED = {  # p: thresholds of exits 0 and 1, exit counts
    1: ([0.49862337, NEVER], [8, 0, 1]),
    2: ([0.49862337, NEVER], [8, 0, 1]),
    10: ([0.740141, 0.9389224], [5, 2, 2]),
    20: ([0.9596587, 0.8737558], [3, 3, 3]),
    30: ([0.99774736, 0.9745116], [1, 2, 6]),
    40: ([0.99774736, 0.9745116], [1, 2, 6]),
    59: ([NEVER, 0.9984989], [0, 2, 7]),
}


@pytest.mark.parametrize("step", RELEASED)
def test_the_released_code_on_few_images(step):
    limits, counts = RELEASED[step]
    (found,) = solvers.geometric_sweep(RELEASED_SCORES, [step])
    np.testing.assert_array_equal(found, np.float32([*limits, ALWAYS]))
    np.testing.assert_array_equal(np.bincount(exits.exit_of(RELEASED_SCORES, found), minlength=3), counts)


def test_geometric_shares_by_hand():
    np.testing.assert_allclose(solvers.geometric_shares(20, 3), [1 / 3, 1 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(solvers.geometric_shares(10, 3), [4 / 7, 2 / 7, 1 / 7], rtol=1e-6)
    np.testing.assert_allclose(solvers.geometric_shares(40, 2), [1 / 3, 2 / 3], rtol=1e-6)
    assert solvers.geometric_shares(7, 4).dtype == np.float32


def test_quantiles_by_hand():
    """Of 8: 2 leave at exit 0, then the 4 surest at exit 1 of those that are left."""
    scores = np.array([[8, 7, 6, 5, 4, 3, 2, 1], [80, 10, 30, 20, 50, 40, 70, 60], [0] * 8], float)
    found = solvers.find_threshold(scores, [0.25, 0.5, 0.25])
    np.testing.assert_array_equal(found, [7, 40, ALWAYS])  # image 0 (80) has left: 70, 60, 50, 40
    np.testing.assert_array_equal(exits.exit_of(scores, found), [0, 0, 2, 2, 1, 1, 1, 1])


def test_ties_leave_together_and_may_starve_the_next_exit():
    scores = np.array([[9, 9, 9, 9, 9, 1], [1, 2, 3, 4, 5, 6], [0] * 6], float)
    found = solvers.find_threshold(scores, [0.4, 0.4, 0.2])
    np.testing.assert_array_equal(found, [9, NEVER, ALWAYS])  # five left for two; one is fewer than two
    assert exits.exit_of(scores, found).tolist() == [0, 0, 0, 0, 0, 2]


def test_too_few_images_for_a_share_means_nobody():
    scores = np.array([[3, 2, 1], [1, 2, 3], [0, 0, 0]], float)
    np.testing.assert_array_equal(
        solvers.find_threshold(scores, [0.3, 0.6, 0.1]), [NEVER, 3, ALWAYS]
    )  # floor(0.9) = 0, floor(1.8) = 1


def test_share_times_images_is_rounded_in_float32():
    """10 x float32(0.1) is 1.0 in float32; float32(0.7) x 10 is 6.99999988 but rounds to 7 in float32."""
    scores = np.stack([np.arange(10.0), np.zeros(10)])
    for share, limit in ((0.1, 9), (0.7, 3)):
        assert solvers.find_threshold(scores, [share, 1 - share])[0] == limit


@hypothesis.given(st.data())
def test_quantiles_equal_a_walk_over_the_sorted_images(data):
    """The rule in words: walk from the surest on, count who is still there, stop at the wanted number."""
    count, images = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 15))
    scores = data.draw(hnp.arrays(np.float32, (count, images), elements=st.integers(0, 6)))
    shares = solvers.geometric_shares(data.draw(st.integers(1, 59)), count)
    gone, expected = set(), []
    for k in range(count - 1):
        limit, seen, wanted = np.float32(NEVER), 0, int(np.float32(images) * shares[k])
        for image in sorted(range(images), key=lambda i, k=k: -scores[k, i]):
            seen += image not in gone
            if image not in gone and seen == wanted:
                limit = scores[k, image]
                break
        gone |= {i for i in range(images) if scores[k, i] >= limit}
        expected.append(limit)
    np.testing.assert_array_equal(solvers.find_threshold(scores, shares), [*expected, ALWAYS])


def test_geometric_sweep_moves_from_the_first_exit_to_the_last():
    correct, scores, costs = cascade(3, 400)
    rows = solvers.geometric_sweep(scores)
    counts = np.stack([exits.evaluate(correct, scores, row, costs).counts for row in rows])
    assert rows.shape == (59, 3)
    np.testing.assert_array_equal(counts[19], [133, 133, 134])  # q = 1: thirds
    assert (np.diff(counts[:, 0]) <= 0).all()
    assert counts[0, 0] == 380  # 0.05 / (0.05 + 0.0025 + 0.000125) of 400, down


def test_geometric_takes_the_best_point_that_keeps_the_budget():
    correct, scores, costs = cascade(3, 400)
    curve = [exits.evaluate(correct, scores, row, costs) for row in solvers.geometric_sweep(scores)]
    for solution in solvers.geometric(correct, scores, costs, [1.0, 2.0, 3.5, 6.0]):
        fits = [point.accuracy for point in curve if point.cost <= solution.budget]
        assert solution.cost <= solution.budget
        assert solution.accuracy == pytest.approx(max([*fits, correct[0].mean()] if not len(fits) else fits))
