"""`tools.predict`: pictures are read before the model is compiled."""

from __future__ import annotations

import json
import types

import jax.numpy as jnp
import pytest

from dyntoken import runs, weights
from dyntoken.preprocessing import Preprocess
from dyntoken.tools import predict
from tests.weights import made

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def compilations(monkeypatch):
    """A run whose model says "dark" or "light"; how often it was traced."""
    traced = []

    def apply(variables, images):
        traced.append(images.shape)
        light = images.mean(axis=(1, 2, 3))
        return types.SimpleNamespace(logits=jnp.stack([-light, light], axis=1))

    how = Preprocess((8, 8), 3, (0.5,) * 3, (0.25,) * 3)
    run = runs.Run(types.SimpleNamespace(apply=apply, num_classes=2), {}, how, ("dark", "light"), 1)
    monkeypatch.setattr(runs, "load_run", lambda workdir, **options: run)
    return traced


def broken(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"no picture")


def test_of_broken_pictures_only_nothing_is_compiled(compilations, tmp_path, capsys):
    broken(tmp_path, "a.jpg", "b.png", "c.webp")
    assert predict.main(["--workdir=run", str(tmp_path), "--batch=2"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("not a picture that can be decoded; left out\n") == 3
    assert not compilations


def test_of_some_the_others_are_predicted_by_one_program(compilations, tmp_path, capsys):
    broken(tmp_path, "a.jpg", "b.jpg", "d.jpg")
    for name, red in (("c.png", 255), ("e.png", 60), ("f.png", 250)):
        Image.new("RGB", (9, 9), (red, red - 40, red - 60)).save(tmp_path / name)
    assert predict.main(["--workdir=run", str(tmp_path), "--batch=2", "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    classes = {row["file"][-5:]: row["classes"][0]["class"] for row in found["predictions"]}
    assert classes == {"c.png": "light", "e.png": "dark", "f.png": "light"}
    assert len(found["failed"]) == captured.err.count("\n") == 3
    assert compilations == [(2, 8, 8, 3)]


def test_a_run_ahead_of_the_pictures_is_the_workdir(compilations, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9), (250, 210, 190)).save(tmp_path / "photos" / "a.png")
    assert predict.main(["runs/mine", "photos", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["predictions"]
    assert row["classes"][0]["class"] == "light" and row["file"] == "photos/a.png"
    for words, message in (
        (["runs/mine"], "runs/mine is a run: which pictures?"),
        (["photos", "photos"], "give --workdir, or --weights"),
    ):
        with pytest.raises(SystemExit):
            predict.main(words)
        assert message in capsys.readouterr().err
    assert predict.main(["--workdir=runs/mine", "runs/mine", "photos"]) == 1
    assert "no picture in this folder" in capsys.readouterr().err


def test_of_a_folder_of_transformers(tmp_path, capsys):
    """Model, pixels and class names by the files in it."""
    model = made.model(norm_eps=1e-12)
    tensors, config = weights.to_transformers(model, made.variables(model), class_names="abcde")
    weights.files.write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    Image.new("RGB", (20, 30), (200, 30, 60)).save(tmp_path / "c.png")
    words = [f"--weights={tmp_path}", str(tmp_path / "c.png"), "--top=5", "--batch=1", "--json"]
    assert predict.main(words) == 0
    (row,) = json.loads(capsys.readouterr().out)["predictions"]
    assert sorted(one["class"] for one in row["classes"]) == list("abcde")
    with pytest.raises(SystemExit):
        predict.main([*words, "--workdir=runs/mine"])
    assert "give --workdir, or --weights, with --model where they do not tell it" in capsys.readouterr().err
