"""Studies at tiny size, end to end: kept, shared, resumed after a SIGKILL, refused in one line."""

import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest

import dyntoken
from dyntoken import train
from dyntoken.studies.table import STUDIES
from dyntoken.tools import study

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ["--scale=tiny", "--set=model.depth=2", "--set=model.width=8"]
TINY += ["--set=data.options.test=20", "--set=checkpoint_steps=0"]
# A few networks of every study; those of the first four are the same.
FEW = {
    "tokens": "attention-drop-0.5,predictor-drop-0.5",
    "exchange": "*-drop-0.5",
    "robustness": "attention-drop-0.5",
    "epochs": "attention-drop-x0,attention-drop-x1",
    "grids": "dense",
    "squeezes": "mean",
    "sites": "etps-one-early",
    "distillation": "dtps-logits-tokens",
    "exits": "multiexit",
    "reuse": "feature",
    "rivals": "tome",
}
SLOW = ("squeezes", "sites", "distillation", "reuse", "exits")
ROWS = {
    "tokens": {"attention-drop-0.5", "predictor-drop-0.5"},
    "exchange": {
        f"{s}-drop-0.5 {w}" for s in ("attention", "predictor") for w in ("kept", "dropped", "random")
    },
    "robustness": {"attention-drop-0.5", "attention-drop-0.5 shuffled", "attention-drop-0.5 random"},
    "epochs": {"attention-drop-x0", "attention-drop-x1"},
    "grids": {"dense 2x2", "dense 3x3", "dense 4x4", "dense 5x5"},
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


def rows_of(out, name):
    with (out / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_study_has_a_case():
    assert set(FEW) == set(STUDIES)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.thorough) for name in FEW],
)
def test_a_study_runs_end_to_end(out, name, capsys):
    assert study.main([name, *TINY, "--seeds=1", f"--only={FEW[name]}", f"--out={out}"]) == 0
    rows = rows_of(out, name)
    assert all(0 <= float(row["top1"]) <= 1 and float(row["gmacs"]) > 0 for row in rows)
    assert {row["row"] for row in rows} == ROWS.get(name, {row["row"] for row in rows}) and rows
    text = capsys.readouterr().out
    assert STUDIES[name].title in text and text.rstrip() == (out / f"{name}.md").read_text().rstrip()
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_a_network_with_a_teacher_is_measured_at_other_grids(tmp_path):
    words = ["grids", "--seeds=1", "--only=dense", "--set=data.eval_split=test[:100]", f"--out={tmp_path}"]
    assert study.main(words) == 0
    assert [row["row"] for row in rows_of(tmp_path, "grids")] == [f"dense {n}x{n}" for n in (4, 6, 7, 8)]


@pytest.mark.thorough
def test_what_is_finished_is_kept_and_shared(out, monkeypatch):
    words = [*TINY, "--seeds=1", f"--out={out}"]
    assert study.main(["tokens", *words, "--only=attention-drop-0.5"]) == 0
    before = (out / "tokens.csv").read_text()

    def never(*args, **more):
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "run", never)
    assert study.main(["tokens", *words, "--only=attention-drop-0.5"]) == 0
    assert (out / "tokens.csv").read_text() == before
    shutil.rmtree(out / "exchange", ignore_errors=True)
    assert study.main(["exchange", *words, "--only=attention-drop-0.5"]) == 0  # the same network
    (folder,) = out.glob("runs/topk_*/0")
    assert (folder / "weights.safetensors").exists() and not (folder / "run" / "checkpoints").exists()


@pytest.mark.thorough
def test_the_dropped_tokens_are_those_that_were_not_kept(out):
    assert study.main(["exchange", *TINY, "--seeds=1", f"--only={FEW['exchange']}", f"--out={out}"]) == 0
    for row in rows_of(out, "exchange"):
        assert (row["corrected"] == "") == row["row"].endswith("kept")


@pytest.mark.parametrize(
    "whole", [pytest.param(False, marks=pytest.mark.thorough), pytest.param(True, marks=pytest.mark.slow)]
)
def test_killed_in_the_middle_it_goes_on_inside_its_run(tmp_path, capsys, whole):
    words = ["tokens", *TINY, "--seeds=1", "--only=attention-drop-0.5", "--set=checkpoint_steps=5"]
    words += ["--set=steps=100"]
    killed = [*words, f"--out={tmp_path / 'killed'}"]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dyntoken.tools.study", *killed], cwd=ROOT, stdout=output, stderr=output
        )
    deadline = time.monotonic() + 300
    while not [p for p in tmp_path.glob("killed/runs/*/0/run/checkpoints/*") if p.name.isdigit()]:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("killed/tokens/rows/*"))
    assert study.main(killed) == 0
    assert "resuming at step" in capsys.readouterr().err
    if whole:  # what it ends with is what an undisturbed one does
        assert study.main([*words, f"--out={tmp_path / 'straight'}"]) == 0
        found, wanted = (
            json.loads((tmp_path / name / "tokens/rows/attention-drop-0.5.0.json").read_text())
            for name in ("killed", "straight")
        )
        assert found["rows"] == wanted["rows"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tokns"], "did you mean tokens"),
        (["tokens", "--only=atention-*"], "matches no network of tokens"),
        (["tokens", "--set=epohs=3"], "epochs"),
        (["tokens", "--set=batch=32"], "give another --out"),
        (["tokens", "--source=pretrained:vit_mini_patch4_28"], "give another --out"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(out, capsys, words, says):
    assert study.main(["tokens", *TINY, "--seeds=1", "--only=attention-drop-0.5", f"--out={out}"]) == 0
    kept = sorted(path.name for path in out.iterdir())
    capsys.readouterr()
    assert study.main([*words, *TINY, "--seeds=1", f"--out={out}"]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert sorted(path.name for path in out.iterdir()) == kept


def test_a_folder_of_another_version_is_left_alone(out, tmp_path, capsys):
    about = json.loads((out / "study.json").read_text()) if (out / "study.json").exists() else {"version": 1}
    (tmp_path / "study.json").write_text(json.dumps({**about, "version": 0}))
    assert study.main(["tokens", *TINY, f"--out={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert "version 0" in said and "another --out" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--data=fake", "--set=data.options={'num_classes': 4, 'channels': 1}", "--img_size=28"],
            "classifies 10 classes, fake has 4",
        ),
        (["--data=fashion_mnist_mini", "--img_size=30"], "not divisible by patch_size"),
        (["--data=fashion_mnist_min"], "did you mean fashion_mnist_mini"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(tmp_path, capsys, words, says):
    source = "--source=pretrained:vit_mini_patch4_28"
    assert study.main(["tokens", source, *words, f"--out={tmp_path / 'new'}"]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_signal_ends_the_command_and_not_the_results(out, capsys, monkeypatch):
    words = ["tokens", *TINY, "--seeds=1", f"--out={out}"]
    assert study.main([*words, "--only=attention-drop-0.5"]) == 0
    before = (out / "tokens.csv").read_text()
    stopped = types.SimpleNamespace(finished=False, signum=signal.SIGTERM)
    monkeypatch.setattr(train, "run", lambda *args, **more: stopped)
    with pytest.raises(SystemExit) as ended:
        study.main([*words, "--only=attention-fuse-0.5"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert (
        "the same command goes on" in capsys.readouterr().err and (out / "tokens.csv").read_text() == before
    )


@pytest.mark.thorough
def test_weights_of_another_architecture_are_refused(tmp_path, capsys):
    model = dyntoken.create_model("etps_deit_tiny_patch8_16", width=8, depth=4, heads=2, num_classes=4)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    dyntoken.save_weights(tmp_path / "etps.safetensors", variables, model=model)
    for words, says in (
        ([f"--source={tmp_path / 'etps.safetensors'}", *TINY], "holds no dense model of one exit"),
        (["--set=model.width=32"], "vit_mini_patch4_28"),
    ):
        assert study.main(["tokens", *words, f"--out={tmp_path / 'new'}"]) == 1
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


def test_a_network_that_cannot_be_is_left_out_and_the_others_finished(out, capsys, monkeypatch):
    from dyntoken.studies.setting import Setting

    real = Setting.config_of

    def broken(self, trial, seed):
        if trial.name == "attention-fuse-0.5":
            raise ValueError("made to fail")
        return real(self, trial, seed)

    monkeypatch.setattr(Setting, "config_of", broken)
    words = ["tokens", *TINY, "--seeds=1", "--only=attention-fuse-0.5,attention-drop-0.5", f"--out={out}"]
    assert study.main(words) == 1
    said = capsys.readouterr()
    assert (
        "left out: attention-fuse-0.5, seed 0: made to fail" in said.err and "attention-drop-0.5" in said.out
    )


def test_the_list_says_what_each_asks(capsys):
    assert study.main(["list"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name} " in said for name in STUDIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_all_networks_of_a_study(tmp_path, name):
    assert study.main([name, *TINY, "--seeds=2", f"--out={tmp_path}"]) == 0
