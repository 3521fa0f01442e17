"""`tools.bench_exits`: forced shares, and what is compared with what."""

from __future__ import annotations

import argparse
import json
from fractions import Fraction

import numpy as np
import pytest

from dyntoken.analysis import timing
from dyntoken.tools import bench_exits

TINY = ["--set=width=24", "--set=depth=2", "--set=heads=2", "--batch=2", "--pairs=1"]
EXITS = ["dvt_vit_mini", "--img_size=14", "--set=exits=1,2", "--exits=75,25", *TINY]


def test_shares_are_read_exactly():
    assert bench_exits.shares("80,15,5") == (Fraction(4, 5), Fraction(3, 20), Fraction(1, 20))
    assert bench_exits.shares("0.8, 0.15, 0.05") == bench_exits.shares("80,15,5")
    for text in ("80,15", "80,15,6", "110,-10", "a,b", "0.5,0.4"):
        with pytest.raises(argparse.ArgumentTypeError, match="percent per exit that sum to 100"):
            bench_exits.shares(text)


@pytest.mark.parametrize(
    ("text", "whole_batches", "whole_images"), [("80,15,5", 20, 5), ("50,30,20", 10, 5), ("99.9,0.1", 20, 20)]
)
def test_periods_and_schedules(text, whole_batches, whole_images):
    parts = bench_exits.shares(text)
    assert (bench_exits.period(parts), bench_exits.period(parts, 64)) == (whole_batches, whole_images)
    leave = bench_exits.schedule(parts, 1000)
    np.testing.assert_array_equal(np.bincount(leave, minlength=len(parts)), [1000 * part for part in parts])


def test_a_schedule_spreads_every_exit_evenly():
    parts = bench_exits.shares("50,25,25")
    np.testing.assert_array_equal(bench_exits.schedule(parts, 8), [0, 1, 0, 2, 0, 1, 0, 2])
    np.testing.assert_array_equal(bench_exits.schedule(bench_exits.shares("0,0,100"), 3), [2, 2, 2])
    np.testing.assert_array_equal(bench_exits.schedule(bench_exits.shares("100,0,0"), 3), [0, 0, 0])


def test_forced_shares_against_all_exits(monkeypatch, capsys):
    """All exits last 30 ms a batch; four batches last 80 ms: 1.5 times as fast."""
    logits = []

    def compare(first, second, *, pairs, warmup):
        logits.append((first().shape, [got.shape for got in second()]))
        times = timing.Times((0.03,)), timing.Times((0.08,))
        return timing.Comparison(*times, (0.375,))

    monkeypatch.setattr(timing, "compare", compare)
    assert bench_exits.main([*EXITS, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    calls, stream = got["modes"]
    assert [calls["mode"], calls["batches"], stream["mode"], stream["batches"]] == [
        "batch by batch",
        2,
        "streaming",
        4,
    ]
    assert logits == [((2, 2, 10), [(2, 10)] * 2), ((2, 2, 10), [(2, 10)] * 4)]
    assert calls["shares"] == stream["shares"] == [0.75, 0.25]
    assert stream["images_per_s"] == pytest.approx(100) and got["ratio"] == pytest.approx(1.5)
    assert stream["all_exits_images_per_s"] == pytest.approx(2 / 0.03)
    first, last = got["gmacs"]
    assert got["gmac_ratio"] == pytest.approx(last / (0.75 * first + 0.25 * last))
    assert got["share_of_ideal"] == pytest.approx(1.5 / got["gmac_ratio"])
    assert calls["ratio"] == pytest.approx(0.75)
    text = bench_exits.report(got)
    assert text.startswith("dvt_vit_mini, 75 / 25 % leave at each exit, random weights, batch 2, float32, ")
    assert "streaming is 1.50 times as fast as all exits (1 pairs)" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["dvt_vit_mini", "--set=exits=1,2", "--exits=80,15,5"],
            "dvt_vit_mini has 2 exits, and --exits names 3",
        ),
        (
            ["vit_mini_patch4_28", "--exits=50,50"],
            "vit_mini_patch4_28 has no exits, and --exits names 2 shares",
        ),
    ],
)
def test_as_many_shares_as_exits(capsys, argv, message):
    assert bench_exits.main([*argv, "--img_size=28"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--train", "--vs=vit_mini_patch4_28"])
def test_a_cascade_is_compared_with_its_own_exits(capsys, option):
    with pytest.raises(SystemExit) as stop:
        bench_exits.main([*EXITS, option])
    assert stop.value.code == 2 and f"unrecognized arguments: {option}" in capsys.readouterr().err
