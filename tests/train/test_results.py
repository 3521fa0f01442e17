"""What an evaluation leaves in its folder."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
from PIL import Image

from dyntoken import data, train
from tests.train.tiny import tiny_config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "run"
    train.run(tiny_config(steps=2, ema=0.5), folder, log=lambda line: None)
    return folder


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.thorough
def test_predictions_agree_with_the_metrics(workdir, tmp_path):
    told = []
    plain = train.evaluate(tiny_config(steps=2, ema=0.5), workdir, log=told.append)
    out = tmp_path / "deep" / "out"
    metrics = train.evaluate(tiny_config(steps=2, ema=0.5), workdir, out=out, log=told.append)
    assert {name: metrics[name] for name in plain if name != "images_per_s"} == {
        name: value for name, value in plain.items() if name != "images_per_s"
    }
    assert metrics.keys() - plain.keys() == {"ece", "ema/ece"}
    rows = read(out / "predictions.csv")  # of the average
    assert len(rows) == 37 and sorted(int(row["file"]) for row in rows) == list(range(37))
    assert np.mean([int(row["right"]) for row in rows]) == pytest.approx(metrics["ema/top1"])
    assert np.mean([row["class_1"] == row["label"] for row in rows]) == pytest.approx(metrics["ema/top1"])
    best = [[float(row[f"probability_{n}"]) for n in range(1, 6)] for row in rows]
    assert all(one == sorted(one, reverse=True) and sum(one) <= 1.001 for one in best)
    classes = read(out / "classes.csv")
    assert sum(int(row["images"]) for row in classes) == 37
    right = sum(int(row["images"]) * float(row["accuracy"]) for row in classes)
    assert right == pytest.approx(37 * metrics["ema/top1"], abs=0.01)
    assert (out / "confusion.png").stat().st_size > 5000
    assert any(str(out) in line for line in told)


def test_what_cannot_be_written_is_said(workdir, tmp_path, monkeypatch):
    told = []
    (tmp_path / "file").write_text("")
    train.evaluate(tiny_config(steps=2, ema=0.5), workdir, out=tmp_path / "file", log=told.append)
    assert any("not written" in line for line in told)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train.evaluate(tiny_config(steps=2, ema=0.5), workdir, out=tmp_path / "out", log=told.append)
    assert (tmp_path / "out" / "classes.csv").exists() and not (tmp_path / "out" / "confusion.png").exists()
    assert any("no confusion.png" in line for line in told)


@pytest.mark.thorough
def test_images_keep_their_names(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8), (90 * number, 0, 0)).save(tmp_path / name / f"{number}.png")
    reading = {"split": "train", "batch": 4, "shards": 2, "size": 8}
    seen = {}
    for batch in data.eval_batches(f"folder:{tmp_path}", named=True, **reading):
        for name, label, red, mask in zip(
            batch["name"], batch["label"], batch["image"][:, 0, 0, 0], batch["mask"], strict=True
        ):
            if mask:
                seen[name.decode()] = (int(label), int(red))
    expected = {
        str(tmp_path / name / f"{number}.png"): (label, 90 * number)
        for label, name in enumerate(("cat", "dog"))
        for number in range(3)
    }
    assert seen == expected
    assert all("name" not in batch for batch in data.eval_batches(f"folder:{tmp_path}", **reading))
