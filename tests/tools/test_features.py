"""`tools.features`, and how it and `tools.predict` go on after they were killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken.tools import features, parts, pictures, predict

Image = pytest.importorskip("PIL.Image")
NAME = "etps_deit_tiny_patch16_224"
TINY = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "num_classes": 5}
MODEL = [f"--model={NAME}", "--at=1", "--keep=0.5", "--img_size=16"]
MODEL += [f"--set={key}={TINY[key]}" for key in TINY if key != "img_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights, and 20 pictures in two folders, of which one does not decode."""
    root, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    model = dyntoken.create_model(NAME, **TINY, at=(1,), keep=0.5)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    dyntoken.save_weights(root / "weights.safetensors", variables, model=model)
    for number in range(20):
        path = root / "photos" / f"{number % 2}" / f"{number:02d}{'x' * number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16 + number, 30, 3), np.uint8)).save(path)
    path.write_bytes(b"no picture")
    return root


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(pictures, "BATCHES", 1)


def words(folder, *more):
    return [str(folder / "photos"), f"--weights={folder / 'weights.safetensors'}", *MODEL, "--batch=4", *more]


def test_features_in_every_format(folder, tmp_path, capsys, small_parts):
    out, table = tmp_path / "deep" / "features.npz", tmp_path / "features.parquet"
    assert features.main(words(folder, f"--out={out}", "--tokens")) == 1
    told = capsys.readouterr()
    assert "19 pictures, 16 features of each" in told.out
    assert told.err.count("not a picture that can be decoded; left out") == told.err.count("\n") == 1
    with np.load(out) as stored:
        found = dict(stored)
    assert [*found] == ["file", "pooled", "tokens", "place", "carrier"]
    assert found["file"].tolist() == pictures.listed([str(folder / "photos")])[:-1]
    assert found["pooled"].shape == (19, 16) and found["tokens"].shape == (19, 9, 16)
    np.testing.assert_array_equal(found["pooled"], found["tokens"][:, 0])
    assert found["place"].shape == (19, 8) and found["carrier"].shape == (19, 16)
    assert [path.name for path in tmp_path.rglob("*")] == ["deep", "features.npz"]  # no parts are left

    parquet = pytest.importorskip("pyarrow.parquet")
    assert features.main(words(folder, f"--out={table}", "--tokens", "--json")) == 1
    assert json.loads(capsys.readouterr().out)["pictures"] == 19
    read = parquet.read_table(table)
    assert read["file"].to_pylist() == found["file"].tolist()
    np.testing.assert_array_equal(np.array(read["pooled"].to_pylist(), np.float32), found["pooled"])
    tokens = read["tokens"].combine_chunks().to_numpy_ndarray()
    np.testing.assert_array_equal(tokens, found["tokens"])


@pytest.mark.parametrize("program", [predict, features])
def test_what_was_stopped_goes_on_where_it_was(program, folder, tmp_path, monkeypatch, small_parts):
    suffix = "csv" if program is predict else "npz"
    whole, resumed = tmp_path / f"whole.{suffix}", tmp_path / f"resumed.{suffix}"
    assert program.main(words(folder, f"--out={whole}")) == 1
    seen, real = [], pictures.columns

    def stopping(predictor, paths):
        if len(seen) == 8:
            raise KeyboardInterrupt
        seen.extend(paths)
        return real(predictor, paths)

    monkeypatch.setattr(pictures, "columns", stopping)
    with pytest.raises(KeyboardInterrupt):
        program.main(words(folder, f"--out={resumed}"))
    stored = resumed.with_name(f"{resumed.name}.parts")
    assert not resumed.exists() and len([*stored.glob("*.npz")]) == 2
    later = []
    monkeypatch.setattr(pictures, "columns", lambda p, paths: (later.extend(paths), real(p, paths))[1])
    assert program.main(words(folder, f"--out={resumed}")) == 1
    assert seen + later == pictures.listed([str(folder / "photos")])  # nothing lost, nothing twice
    assert resumed.read_bytes() == whole.read_bytes() and not stored.exists()


def test_parts_of_something_else_are_refused(folder, tmp_path, monkeypatch, capsys, small_parts):
    out = tmp_path / "guesses.csv"
    with monkeypatch.context() as patched:
        patched.setattr(parts.Parts, "finish", lambda self, write: None)
        predict.main(words(folder, f"--out={out}"))
    capsys.readouterr()
    assert predict.main(words(folder, f"--out={out}", "--top=2")) == 1
    error = capsys.readouterr().err
    assert "guesses.csv.parts holds a part of other pictures, weights or options" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out=features.csv"], "give a file that ends in .npz or .parquet"),
        (
            ["--out=f.npz", "--workdir=runs/mine"],
            "give --workdir, or --weights, with --model where",
        ),
    ],
)
def test_options_that_do_not_go_together(folder, capsys, more, said):
    with pytest.raises(SystemExit) as ended:
        features.main(words(folder, *more))
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_exits_are_a_column(exit_workdir, folder, tmp_path, capsys):
    out = tmp_path / "exits.csv"
    grey = tmp_path / "photos"
    grey.mkdir()
    for number in range(3):
        Image.new("L", (16, 16), 80 * number).save(grey / f"{number}.png")
    more = ["--thresholds=0.1,0.1", f"--out={out}", "--top=1"]
    assert predict.main([f"--workdir={exit_workdir}", str(grey), *more]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["file", "class", "probability", "exit"]
    assert [row["exit"] for row in rows] == ["0"] * 3


def test_progress_is_a_line_that_changes_on_a_terminal(capsys, monkeypatch):
    done = [{"file": np.zeros(3)}, {"file": np.zeros(2)}]
    assert len([*pictures.watched(done, 5)]) == 2
    assert capsys.readouterr().err == ""  # soon over: nothing to say
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert len([*pictures.watched(done, 5)]) == 2
    told = capsys.readouterr().err
    assert "/5 pictures" in told and "\n" not in told


@pytest.mark.slow  # three processes that start and compile
@pytest.mark.parametrize("program", ["predict", "features"])
def test_killed_at_any_moment_the_result_is_that_of_an_uninterrupted_run(program, folder, tmp_path):
    suffix = "csv" if program == "predict" else "npz"
    whole, killed = tmp_path / f"whole.{suffix}", tmp_path / f"killed.{suffix}"
    for number in range(400):
        path = tmp_path / "photos" / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (number % 256, 255 - number % 256, number // 2)).save(path)
    command = [sys.executable, "-m", f"dyntoken.tools.{program}", *words(folder)[1:-1], "--batch=2"]

    def start(out):
        return subprocess.Popen(
            [*command, str(tmp_path / "photos"), f"--out={out}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    process = start(whole)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    kills = 0
    for wanted in (1, 4, 9):
        process, stored = start(killed), killed.with_name(f"{killed.name}.parts")
        while process.poll() is None and len([*stored.glob("*.npz")]) < wanted:
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills
    process = start(killed)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert killed.read_bytes() == whole.read_bytes()
    if program == "features":
        with np.load(killed) as stored:
            assert len(set(stored["file"].tolist())) == 400
