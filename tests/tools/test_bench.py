"""`tools.bench`: what is compared with what, and the numbers it derives."""

from __future__ import annotations

import argparse
import json
from fractions import Fraction

import numpy as np
import pytest

from dyntoken.analysis import timing
from dyntoken.tools import bench, bench_exits

TINY = ["--set", "width=24", "--set", "depth=2", "--set", "heads=2", "--batch=2", "--pairs=1"]


@pytest.fixture
def known_times(monkeypatch):
    """Replaces the measurement, not the models: 30 ms against 20 ms."""
    made = []

    def compare(first, second, *, pairs):
        times = timing.Times((0.03,)), timing.Times((0.02,))
        return timing.Comparison(*times, (1.4, 1.5, 1.6, 1.7, 1.8))

    def record(model, variables, images):
        made.append((model, images.shape))
        return lambda: None

    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setattr(timing, "evaluation", record)
    monkeypatch.setattr(timing, "training", record)
    return made


def run(capsys, *argv):
    assert bench.main([*argv, *TINY, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_dense_counterpart_is_the_default(known_times, capsys):
    got = run(capsys, "dtps_vit_mini_patch4_28", "--keep=0.5", "--at=1", "--dtype=bfloat16")
    assert [row["name"] for row in got["models"]] == ["vit_mini_patch4_28", "dtps_vit_mini_patch4_28"]
    assert [row["images_per_s"] for row in got["models"]] == pytest.approx([2 / 0.03, 100.0])
    assert got["models"][1]["latency_ms"] == pytest.approx(20.0)
    assert (got["ratio"], got["ratio_quartiles"]) == (1.6, [1.5, 1.7])
    assert got["gmac_ratio"] == pytest.approx(got["models"][0]["gmacs"] / got["models"][1]["gmacs"])
    assert got["share_of_ideal"] == pytest.approx(1.6 / got["gmac_ratio"])
    dense, reduced = (model for model, _ in known_times)
    assert (dense.method, reduced.method, reduced.keep, reduced.at) == (None, "dtps", 0.5, (1,))
    assert {str(dict(m.backbone.options)["dtype"]) for m in (dense, reduced)} == {"bfloat16"}
    assert {shape for _, shape in known_times} == {(2, 28, 28, 1)}


def test_vs_names_another_baseline_without_the_options_of_the_method(known_times, capsys):
    got = run(capsys, "dtps_vit_mini_patch4_28", "--keep=0.5", "--at=1", "--vs", "topk_vit_mini_patch4_28")
    assert got["models"][0]["name"] == "topk_vit_mini_patch4_28"
    assert known_times[0][0].keep == 0.7


@pytest.mark.parametrize(("name", "masked"), [("dtps", True), ("evit", False)])
def test_training_in_mask_form_has_no_ideal(known_times, capsys, name, masked):
    got = run(capsys, f"{name}_vit_mini_patch4_28", "--at=1", "--train")
    assert got["mode"] == "train"
    assert (got["share_of_ideal"] is None) == masked


def test_the_real_thing_prints_a_table(capsys):
    assert bench.main(["topk_vit_mini_patch4_28", "--keep=5", "--at=0", *TINY]) == 0
    text = capsys.readouterr().out
    assert text.startswith("evaluation, random weights, batch 2, float32, ")
    assert "vit_mini_patch4_28 " in text and "% of ideal" in text
    assert "(quartiles " in text and "of 1 pairs" in text


EXITS = ["dvt_vit_mini", "--img_size=14", "--set=exits=1,2", "--exits=75,25"]


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
    got = run(capsys, *EXITS)
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
        (["--exits=80,15,5"], "dvt_vit_mini has 2 exits, and --exits names 3 shares"),
        (["--exits=75,25", "--train"], "drop --vs and --train"),
        (["--exits=75,25", "--vs=vit_mini_patch4_28"], "drop --vs and --train"),
    ],
)
def test_errors_of_forced_shares(capsys, argv, message):
    assert bench.main(["dvt_vit_mini", "--img_size=14", "--set=exits=1,2", *argv]) == 1
    assert message in capsys.readouterr().err


def test_forced_shares_need_exits(capsys):
    assert bench.main(["vit_mini_patch4_28", "--exits=50,50"]) == 1
    assert "vit_mini_patch4_28 has no exits, and --exits names 2 shares" in capsys.readouterr().err
