"""What the plots show, read back from their lines and areas."""

from __future__ import annotations

import numpy as np
import pytest

from dyntoken.analysis import exit_plots, literature

pytest.importorskip("matplotlib")


def test_curves_are_in_per_cent_and_sorted_by_cost():
    series = [
        exit_plots.Series("alone", [1.0, 2.0], [0.5, 0.75], "anytime"),
        exit_plots.Series("ours", [2.0, 1.5], [0.7, 0.6], band=[0.01, 0.02]),
        exit_plots.Series("a paper", [1.0], [0.4], "cited"),
    ]
    figure = exit_plots.curves(series, xlabel="cost", title="a title")
    (axis,) = figure.axes
    first, ours, cited = axis.lines
    np.testing.assert_allclose(first.get_xydata(), [[1, 50], [2, 75]])
    np.testing.assert_allclose(ours.get_xydata(), [[1.5, 60], [2, 70]])
    assert (first.get_linestyle(), ours.get_linestyle(), cited.get_linestyle()) == ("None", "-", ":")
    (band,) = axis.collections
    edges = {round(float(y), 6) for x, y in band.get_paths()[0].vertices if x == 1.5}
    assert edges == {58.0, 62.0}
    assert (axis.get_xlabel(), axis.get_title()) == ("cost", "a title")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alone", "ours", "a paper"]
    assert len({line.get_color() for line in axis.lines}) == 3


def test_shares_are_stacked_from_the_first_exit_up():
    figure = exit_plots.shares([1.0, 2.0], np.array([[1.0, 0.0], [0.25, 0.75]]), xlabel="budget", title="")
    (axis,) = figure.axes
    lower, upper = (area.get_paths()[0].vertices for area in axis.collections)
    assert max(y for x, y in lower if x == 2.0) == 25.0
    assert (min(y for x, y in upper if x == 2.0), max(y for x, y in upper if x == 2.0)) == (25.0, 100.0)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["exit 1", "exit 0"]


def test_a_single_budget_is_a_bar():
    figure = exit_plots.shares([1.5], np.array([[0.2, 0.3, 0.5]]), xlabel="", title="")
    bars = figure.axes[0].patches
    assert [round(bar.get_height(), 6) for bar in bars] == [20, 30, 50]
    assert [round(bar.get_y(), 6) for bar in bars] == [0, 20, 50]
    assert figure.axes[0].get_xticklabels()[0].get_text() == "1.5"


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="no curve to draw"):
        exit_plots.curves([], xlabel="", title="")
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(1,\)"):
        exit_plots.shares([1.0], np.ones((2, 3)), xlabel="", title="")


def test_published_rows_are_for_imagenet_only():
    rows = literature.rows("imagenet2012:5.1.0")
    assert rows["MSDNet"] == ((0.75, 69.82), (2.0, 74.2))
    assert rows["DVT(DeiT-S)"][3] == (2.9, 80.4)
    assert "arXiv" in literature.__doc__
    for name in ("fashion_mnist_mini", "imagenet_v2"):
        with pytest.raises(ValueError, match=f"this run is on {name}"):
            literature.rows(name)
