"""What a study's table says, from made numbers."""

import dataclasses

import pytest

from dyntoken.studies import report
from dyntoken.studies.trial import Study


def made(name, top1, group="g", **values):
    """What is stored of a network, one entry per seed."""
    return [
        {
            "trial": name,
            "seed": seed,
            "seconds": 60.0,
            "rows": [
                {"name": name, "series": name, "group": group, "values": {"top1": x, "gmacs": 1.0, **values}}
            ],
        }
        for seed, x in enumerate(top1)
    ]


STUDY = Study("a title", "that squeezing leads", lambda setting: [], expected={"drop": -5.0})
STORED = [
    *made("squeeze", (0.90, 0.92, 0.91)),
    *made("fuse", (0.89, 0.91, 0.90)),
    *made("drop", (0.80, 0.82, 0.81), corrected=0.25),
]


def test_mean_spread_gap_and_guess_by_hand():
    squeeze, fuse, drop = report.summarize(STUDY, STORED, dense=0.95)
    assert squeeze.mean == pytest.approx(0.91) and squeeze.spread == pytest.approx(0.01)
    assert drop.gap == pytest.approx(-14.0) and drop.expected == -5.0 and fuse.expected is None


def test_what_lies_within_the_spread_is_a_tie():
    rows = report.summarize(STUDY, STORED, dense=0.95)
    # Spreads of 0.01 each: differences of up to 1.41 points are ties.
    assert [report.standing(row, rows) for row in rows] == ["best", "tie", "-10.00"]
    alone = report.summarize(STUDY, made("drop", (0.8,)), dense=0.95)
    assert report.standing(alone[0], alone) == ""
    single = report.summarize(STUDY, [*made("drop", (0.8,)), *made("fuse", (0.9,))], dense=0.95)
    assert report.standing(single[0], single) == "-10.00, spread unknown"


def test_the_table_shows_the_guess_beside_the_result():
    rows = report.summarize(STUDY, STORED, dense=0.95)
    text = report.markdown("tokens", STUDY, rows, {"command": "`x`"})
    assert "Expected before the first run: that squeezing leads" in text and "- command: `x`" in text
    assert "| drop | 1.000 | 81.00 | 1.00 | 3 | 25.0 % | -14.00 | -5.0 | -10.00 |" in text
    assert "| squeeze | 1.000 | 91.00 | 1.00 | 3 |  | -4.00 |  | best |" in text


def test_csv_has_a_line_per_seed():
    lines = report.as_csv("tokens", STUDY, STORED).splitlines()
    assert lines[0] == "study,row,series,group,seed,top1,gmacs,corrected,expected,seconds"
    assert lines[-1] == "tokens,drop,drop,g,2,0.81,1,0.25,-5.0,60.0" and len(lines) == 10


def test_rows_of_one_point_each_are_drawn_below_each_other():
    rows = report.summarize(STUDY, STORED, dense=0.95)
    (axis,) = report.draw(STUDY, rows, (1.0, 0.95)).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["squeeze", "fuse", "drop"]
    same_cost = [dataclasses.replace(row, series="one") for row in rows]
    (axis,) = report.draw(STUDY, same_cost, (1.0, 0.95)).axes
    assert len(axis.get_yticklabels()) == 3
    line = [
        dataclasses.replace(row, others={"gmacs": cost})
        for row, cost in zip(same_cost, (1.0, 2.0, 3.0), strict=True)
    ]
    (axis,) = report.draw(STUDY, line, (1.0, 0.95)).axes
    assert axis.get_xlabel() == "GMACs of an image"
