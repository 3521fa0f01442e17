"""Sweep and search on the model and the pictures that come with the package."""

import csv
import json

import pytest

from dyntoken.tools import search, sweep

WORDS = [
    "pretrained:vit_mini_patch4_28",
    "--data=fashion_mnist_mini",
    "--images=64",
    "--pairs=1",
    "--batch=32",
]


@pytest.mark.thorough
def test_rows_are_measured_kept_and_drawn(tmp_path, capsys):
    out = tmp_path / "out"
    words = [*WORDS, "--methods=etps", "--keep=0.5", f"--out={out}"]
    assert sweep.main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["method"], row["keep"]) for row in rows] == [("dense", 1.0), ("etps", 0.5)]
    assert rows[0]["agrees"] == 1.0 and rows[0]["accuracy"] > 0.8
    assert 0.5 < rows[1]["agrees"] < 1.0 and rows[1]["gmacs"] < 0.7 * rows[0]["gmacs"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # A second command adds what is missing, and what a kill cut short is measured again.
    with (out / "sweep.csv").open("a") as file:
        file.write("evit,0.5,0.01")
    before = (out / "sweep.csv").read_text().splitlines()[:3]
    assert sweep.main([*words, "--methods=etps,topk"]) == 0
    with (out / "sweep.csv").open(newline="") as file:
        stored = [(row["method"], row["keep"]) for row in csv.DictReader(file)]
    assert (out / "sweep.csv").read_text().splitlines()[:3] == before
    assert stored.count(("etps", "0.5")) == 1 and ("topk", "0.5") in stored
    assert "topk" in capsys.readouterr().out
    # Times alone can be taken again; what was answered stays.
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert sweep.main([*words, "--retime"]) == 0
    again = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    timed = ("speed_up", "images_per_s")
    assert [{k: v for k, v in row.items() if k not in timed} for row in rows] == [
        {k: v for k, v in row.items() if k not in timed} for row in again
    ]
    assert all(a["images_per_s"] != b["images_per_s"] for a, b in zip(rows, again, strict=True))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--methods=dtps"], "train it first"),
        (["--methods=etsp"], "did you mean"),
        (["--methods=etps:fuse=squeze"], "squeeze"),
        (["--keep=1.5"], "1.5"),
        (["--data=fashion_mnist_min"], "fashion_mnist_mini"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_computed(tmp_path, capsys, words, says):
    assert sweep.main([*WORDS, f"--out={tmp_path / 'out'}", *words]) != 0
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_missing_data_is_said_before_weights_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep.calibrate, "load", None)
    words = ["--data=fashion_mnist_mini", "--split=dev", f"--out={tmp_path / 'out'}"]
    assert sweep.main(["none.npz", *words]) == 1
    assert "dev" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_of_another_sweep_is_left_alone(tmp_path, capsys):
    (tmp_path / "sweep.json").write_text("{}")
    assert sweep.main([*WORDS, "--methods=etps", f"--out={tmp_path}"]) == 1
    assert "another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_schedule_is_found_within_its_budget(capsys):
    words = [*WORDS, "--images=200", "--gmacs=0.6", "--levels=0.6,0.3", "--json"]
    assert search.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    best = next(row for row in found["rows"] if row["best"])
    uniform = next(row for row in found["rows"] if row["chosen_by"] == "uniform")
    assert best["cost"] <= 0.612 and uniform["cost"] <= 0.6
    assert best["moved"] <= uniform["moved"] and "load_pretrained" in found["call"]


def test_a_budget_is_a_share(capsys):
    with pytest.raises(SystemExit) as ended:
        search.main([*WORDS, "--gmacs=6"])
    assert ended.value.code == 2
    assert "between 0 and 1" in capsys.readouterr().err
