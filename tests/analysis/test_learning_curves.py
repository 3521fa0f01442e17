"""Learning curves: which lines, through which points."""

from __future__ import annotations

import pytest

from dyntoken.analysis.learning_curves import learning_curves

ROWS = [
    {"step": 1, "kind": "train", "ce": 2.0, "loss": 2.5, "lr": 0.1, "grad_norm": 9.0, "data_wait": 0.0},
    {"step": 2, "kind": "train", "ce": 1.0, "loss": 1.5, "lr": 0.1, "ce_per_exit": [1.0, 2.0]},
    {"step": 2, "kind": "eval", "top1": 0.25, "ema/top1": 0.2, "loss": 2.0, "count": 37, "v2/top1": 0.1},
    {"step": 4, "kind": "eval", "top1": 0.2, "ema/top1": 0.3, "loss": 1.0, "count": 37, "v2/top1": 0.2},
]


def lines(axis):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}


def test_every_curve_and_its_best_point():
    left, right = learning_curves(ROWS, title="run").axes
    assert lines(left) == {
        "loss, training": ([1, 2], [2.5, 1.5]),
        "ce, training": ([1, 2], [2.0, 1.0]),
        "loss, evaluation": ([2, 4], [2.0, 1.0]),
    }
    assert lines(right) == {
        "top1  best 25.00 at 2": ([2, 4], [25.0, 20.0]),
        "ema/top1  best 30.00 at 4": ([2, 4], [20.0, 30.0]),
        "v2/top1  best 20.00 at 4": ([2, 4], [10.0, 20.0]),
    }
    styles = [(line.get_color(), line.get_linestyle()) for line in right.lines]
    assert styles[0][0] == styles[1][0] != styles[2][0]  # a set has one colour, the average is dashed
    assert [style for _, style in styles] == ["-", "--", "-"]


def test_a_single_loss_of_weight_one_is_drawn_once():
    rows = [{"step": s, "kind": "train", "ce": 2.0 / s, "loss": 2.0 / s} for s in (1, 2)]
    left, right = learning_curves(rows, title="run").axes
    assert list(lines(left)) == ["loss, training"] and not right.lines


def test_a_curve_of_one_point_is_seen():
    left, _ = learning_curves([ROWS[0]], title="run").axes
    assert [line.get_marker() for line in left.lines] == [".", "."]
    left, _ = learning_curves(ROWS[:2], title="run").axes
    assert [line.get_marker() for line in left.lines] == ["", ""]


def test_nothing_recorded():
    with pytest.raises(ValueError, match="no curve to draw"):
        learning_curves([], title="run")
