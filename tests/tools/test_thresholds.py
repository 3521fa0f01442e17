"""`tools.thresholds` end to end on a tiny run, and what it writes."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys

import numpy as np
import pytest

import dyntoken
from dyntoken.analysis import macs, timing
from dyntoken.eval import exits
from dyntoken.tools import thresholds
from tests.tools import exit_run

image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def workdir(exit_workdir, tmp_path_factory):
    """A copy that this module may write into."""
    return shutil.copytree(exit_workdir, tmp_path_factory.mktemp("budget") / "run")


@pytest.fixture(scope="module", autouse=True)
def logits_once():
    """Every exit runs once over a workdir's split, whatever many tests ask."""
    load, known = thresholds.load, {}

    def remembered(workdir, args, unit):
        key = (str(workdir), args.split, args.ema, unit)
        if key not in known:
            known[key] = load(workdir, args, unit)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "load", remembered)
        yield


@pytest.fixture(scope="module")
def gmacs():
    model = dyntoken.create_model(exit_run.NAME, **exit_run.SMALL, num_classes=5, img_size=16, in_chans=3)
    return macs.gmacs(model)


@pytest.fixture(scope="module")
def swept(workdir):
    """(printed JSON, rows of the CSV, stderr) of a run with all solvers and three budgets."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        assert thresholds.main([f"--workdir={workdir}", "--points=3", "--json"]) == 0
    with (workdir / "budget" / "curves.csv").open() as file:
        return json.loads(out.getvalue()), list(csv.DictReader(file)), err.getvalue()


@pytest.mark.thorough
def test_json_and_calibration_file_say_the_same(swept, workdir, gmacs):
    printed, _, told = swept
    stored = json.loads((workdir / "budget" / "calibration.json").read_text())
    assert printed == stored
    assert (stored["model"], stored["rule"], stored["solver"], stored["unit"]) == (
        exit_run.NAME,
        "confidence",
        "optimal",
        "gmacs",
    )
    assert stored["images"] == {"calibration": 31, "held-out": 30}
    assert stored["gmacs"] == stored["costs"] == pytest.approx(gmacs)
    assert stored["budgets"] == pytest.approx([gmacs[0], (gmacs[0] + gmacs[2]) / 2, gmacs[2]])
    assert np.shape(stored["thresholds"]) == (3, 3)
    assert stored["thresholds"][0] == [exits.ALWAYS] * 3  # the first budget leaves no choice
    assert list(stored["solvers"]) == ["geometric", "genetic", "optimal"]
    for index, best in enumerate(stored["solvers"]["optimal"]):
        assert best["resolution"] == 0.0 and sum(best["counts"]) == 31
        assert best["cost"] <= best["budget"] * (1 + 1e-9)
        assert best["accuracy"] >= max(
            stored["solvers"][s][index]["accuracy"] for s in ("geometric", "genetic")
        )
    assert "written: calibration.json, curves.csv, curves.png, shares.png" in told


def test_csv_holds_every_point(swept, gmacs):
    _, rows, _ = swept
    kinds = [(row["kind"], row["solver"], row["rule"], row["half"]) for row in rows]
    expected = []
    for half in ("calibration", "held-out"):
        expected += [("anytime", "", "confidence", half)] * 3
        for solver in ("geometric", "genetic", "optimal"):
            expected += [("budgeted", solver, "confidence", half)] * 3
    for rule in ("entropy", "margin", "random"):
        expected += [
            ("budgeted", "optimal", rule, half) for half in ("calibration", "held-out") for _ in range(3)
        ]
    assert kinds == expected
    for row in rows:
        shares = [float(row[f"share_{index}"]) for index in (0, 1, 2)]
        assert sum(shares) == pytest.approx(1, abs=1e-8)
        assert float(row["cost"]) == pytest.approx(np.dot(shares, gmacs), rel=1e-6)
        assert float(row["gmacs"]) == float(row["cost"]) and row["unit"] == "gmacs"
        images = 31 if row["half"] == "calibration" else 30
        accuracy = float(row["accuracy"])
        assert accuracy * images == pytest.approx(round(accuracy * images), abs=1e-6)
        assert float(row["standard_error"]) == pytest.approx(
            np.sqrt(accuracy * (1 - accuracy) / images), abs=1e-8
        )
    assert [float(row["share_1"]) for row in rows[:3]] == [0, 1, 0] and rows[0]["budget"] == ""


def test_pictures_are_written(swept, workdir):
    for name, size in (("curves", (984, 600)), ("shares", (888, 504))):
        with image.open(workdir / "budget" / f"{name}.png") as picture:
            assert picture.size == size
            pixels = np.asarray(picture.convert("L"))
        assert 0.02 < (pixels < 250).mean() < 0.9


def test_table_of_given_budgets_and_a_rival_beside_it(workdir, exit_workdir, capsys, tmp_path):
    before = json.loads((exit_workdir / "config.json").read_text())
    other = {**before, "model": {**before["model"], "exits": [1, 3]}}
    rival = exit_run.make_workdir(tmp_path / "rival", other)
    argv = [f"--workdir={workdir}", "--gmacs=1.0,2.0", "--rule=margin", f"--vs={rival}", "--points=2"]
    assert thresholds.main([*argv, "--solver=optimal"]) == 0
    out = capsys.readouterr().out
    assert (
        "dvt_vit_mini, margin rule, 31 calibration + 30 held-out images of fake/test; costs in GMACs" in out
    )
    lines = [line.split() for line in out.splitlines()]
    assert [line[:2] for line in lines if line[1:2] == ["optimal"]][:2] == [
        ["1", "optimal"],
        ["2", "optimal"],
    ]
    assert sum(line[:3] == ["exit", "1", "alone"] for line in lines) == 2  # of both models
    with (workdir / "budget" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    mine = [row for row in rows if row["share_2"] != ""]
    assert len(rows) - len(mine) == 2 * (2 + 2)  # two exits, two budgets, both halves
    stored = json.loads((workdir / "budget" / "calibration.json").read_text())
    assert (stored["rule"], stored["budgets"]) == ("margin", [1.0, 2.0])


def test_measured_times_are_costs(workdir, monkeypatch, capsys):
    def exit_times(model, variables, images, *, calls=5):
        assert images.shape == (16, 16, 16, 3) and len(model.exits) == 3
        assert all(
            leaf.devices() == {images.device}
            for leaf in [variables["params"]["exit_0"]["head"]["cls"]["bias"]]
        )
        return np.array([0.001, 0.002, 0.004])

    monkeypatch.setattr(timing, "exit_times", exit_times, raising=False)
    assert thresholds.main([f"--workdir={workdir}", "--ms=2.5", "--solver=geometric", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unit"] == "ms" and found["costs"] == pytest.approx([1, 2, 4]) and found["budgets"] == [2.5]
    assert found["gmacs"] != found["costs"] and found["solver"] == "geometric"
    assert 1 <= found["solvers"]["geometric"][0]["cost"] <= 2.5
    assert (
        thresholds.main([f"--workdir={workdir}", "--ms", "--points=4", "--solver=geometric", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["budgets"] == pytest.approx([1, 2, 3, 4])


def test_without_matplotlib_the_tables_are_written_all_the_same(workdir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shutil.rmtree(workdir / "budget", ignore_errors=True)
    assert thresholds.main([f"--workdir={workdir}", "--gmacs=1", "--solver=geometric"]) == 0
    assert sorted(path.name for path in (workdir / "budget").iterdir()) == ["calibration.json", "curves.csv"]
    assert "no pictures: pictures need matplotlib: pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workdir=nowhere"], "no run in"),
        (["--rule=confidense"], "unknown exit rule 'confidense': did you mean confidence?"),
        (["--solver=optimum"], "unknown threshold solver 'optimum': did you mean optimal?"),
        (["--ema"], "keeps no weight average"),
        (["--split=tset"], "has no split 'tset'"),
        (["--gmacs=1e-9"], "budget 1e-09 is below the first exit, which every image pays"),
        (["--points=1"], "points must be at least 2"),
        (["--published"], "this run is on fake: leave --published out"),
    ],
)
def test_bad_input_is_one_line_and_status_1(workdir, argv, message, capsys):
    assert thresholds.main([f"--workdir={workdir}", *argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("python -m dyntoken.tools.thresholds: error: ")
    assert message in captured.err and captured.err.count("\n") == 1


def test_a_budget_that_is_no_number_is_one_line_and_status_2(workdir, capsys):
    with pytest.raises(SystemExit) as stop:
        thresholds.main([f"--workdir={workdir}", "--gmacs=nan"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--gmacs: 'nan'" in error and error.count("\n") == 1


def test_a_model_without_exits_and_a_run_without_checkpoint(tmp_path, capsys):
    config = exit_run.exit_config(
        model={"name": "vit_mini", "patch_size": 8, "depth": 1, "width": 8, "heads": 2}
    )
    plain = exit_run.make_workdir(tmp_path / "plain", config)
    assert thresholds.main([f"--workdir={plain}"]) == 1
    assert "vit_mini has no exits: thresholds need a model with several" in capsys.readouterr().err
    shutil.rmtree(plain / "checkpoints")
    assert thresholds.main([f"--workdir={plain}"]) == 1
    assert "no checkpoints in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: --workdir"),
        (["--workdir=x", "--gmacs=a,b"], "'a,b': give a sequence (3-6-9 or 3,6,9), each a number"),
        (["--workdir=x", "--gmacs=1", "--ms=1"], "not allowed with argument --gmacs"),
    ],
)
def test_bad_options_are_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        thresholds.main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
