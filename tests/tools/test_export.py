"""`tools.export`: writes, checks, deletes what disagrees."""

import importlib.util
import json

import pytest

import dyntoken
from dyntoken.exporting import checking
from dyntoken.tools import export
from tests.exporting.small import MODELS, model_of, variables_of

NAME = "dtps_deit_tiny_patch16_224"
SET = [f"--set={key}={value}" for key, value in MODELS[NAME].items() if key not in ("at", "img_size")]
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """NAME, its options and its weights."""
    model = model_of(NAME)
    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    dyntoken.save_weights(file, variables_of(model), model=model)
    return [NAME, *SET, "--at=1", "--img_size=16", f"--weights={file}", "--platforms=cpu"]


def test_a_table_of_what_was_checked(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "BATCHES", (1, 7))
    monkeypatch.setattr(export, "PAIRS", 1)
    assert export.main([*words, f"--out={tmp_path}", "--bench", "--batch=2"]) == 0
    table, times, written = capsys.readouterr().out.strip().split("\n\n")
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [row[:3] for row in rows] == [["model.cpu.jax", "jax", "1"], ["model.cpu.jax", "jax", "7"]]
    assert all(row[-3:] == ["equal", "0", "agrees"] for row in rows)
    assert [line.split()[-3] for line in times.splitlines()[1:]] == ["1", "1", "2", "2"]
    assert written == f"input: float32 [b, 16, 16, 3]\nwritten: {tmp_path}"
    assert (tmp_path / "model.cpu.jax").exists()


def test_what_was_there_is_replaced_and_said(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "BATCHES", (1,))
    program = {"name": "model", "jax": {p: f"model.{p}.jax" for p in ("cuda", "tpu")}, "onnx": "model.onnx"}
    program["inputs"] = {"images": {"shape": ["b", 16, 16, 3], "type": "float32"}}
    about = {"weights": "weights.safetensors", "programs": [program]}
    (tmp_path / "model.json").write_text(json.dumps(about))
    for name in ("model.cuda.jax", "model.onnx", "notes.onnx"):
        (tmp_path / name).touch()
    assert export.main([*words, f"--out={tmp_path}", "--normalise"]) == 0
    *_, said = capsys.readouterr().out.strip().split("\n\n")
    assert said == (
        f"replaced what was in {tmp_path}: cuda, tpu, onnx; float32\n"
        f"input: uint8 [b, 16, 16, 3]\nwritten: {tmp_path}"
    )
    names = {"model.cpu.jax", "model.json", "weights.safetensors", "notes.onnx"}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_what_disagrees_is_deleted(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "BATCHES", (1,))
    monkeypatch.setattr(checking, "TOLERANCE", -1.0)
    monkeypatch.setattr(checking, "NEAR", -1.0)
    assert export.main([*words, f"--out={tmp_path / 'gone'}", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        f"model.cpu.jax by jax at batch 1 does not agree with the model; {tmp_path / 'gone'} is deleted\n"
    )
    assert json.loads(captured.out)["checked"][0]["agrees"] is False
    assert not (tmp_path / "gone").exists()


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx and onnxruntime (extra [export])")
def test_onnx_and_pixels(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "BATCHES", (3,))
    assert export.main([*words, f"--out={tmp_path}", "--format=onnx", "--normalise", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["file"] for row in found["checked"]} == {"model.onnx"} and not found["failed"]


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ([NAME, "--out=x"], 2, "give --weights, or a run's workdir"),
        ([NAME, "--out=x", "--weights=none.npz"], 1, "none.npz"),
        (["runs/min", "--out=x"], 1, "no run in runs/min: give the workdir of a training run"),
        ([".", "--out=x", "--keep=0.5"], 2, "give the model's NAME and --weights=."),
        ([NAME], 2, "required: --out"),
    ],
)
def test_bad_input_is_one_line(argv, status, message, capsys):
    try:
        assert export.main(argv) == status
    except SystemExit as stop:
        assert stop.code == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_unknown_platform_is_one_line(words, tmp_path, capsys):
    assert export.main([*words[:-1], "--platforms=gpu", f"--out={tmp_path / 'x'}"]) == 1
    assert "unknown platform 'gpu'" in capsys.readouterr().err and not (tmp_path / "x").exists()
