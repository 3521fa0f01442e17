"""`tools.bench`: what is compared with what, and the numbers it derives."""

from __future__ import annotations

import json

import pytest

from dyntoken.analysis import timing
from dyntoken.tools import bench

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
