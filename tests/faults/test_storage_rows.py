"""What a run records and says: rows, steps in messages, values that are not finite, a full disk."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken import checkpoints, train
from dyntoken.train import loop, sharding
from dyntoken.train.build import Run
from tests.train.test_checkpoint import make_state
from tests.train.test_loop import CrashError, Log, assert_identical, crash, rows
from tests.train.tiny import tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train.run(tiny_config(steps=2), tmp_path_factory.mktemp("trained"), log=Log())


@pytest.mark.parametrize(
    "changed", [{"log_steps": 3}, {"curves": True}, {"keep_checkpoints": 5, "checkpoint_steps": 3}]
)
def test_a_finished_run_is_evaluated_once(trained, tmp_path, monkeypatch, changed):
    workdir = shutil.copytree(trained.workdir, tmp_path / "run")
    before = rows(workdir)
    monkeypatch.setattr(loop, "measure", lambda *_: pytest.fail("evaluated again"))
    again = train.run({**tiny_config(steps=2).to_dict(), **changed}, workdir, log=Log())
    assert again.metrics == trained.metrics and rows(workdir) == before


def test_another_evaluation_takes_the_place_of_the_row(trained, tmp_path):
    workdir = shutil.copytree(trained.workdir, tmp_path / "run")
    fake = {"image_size": 16, "train": 64, "test": 21, "num_classes": 7}
    more = {**tiny_config(steps=2).to_dict(), "evals": {"more": {"name": "fake", "options": fake}}}
    train.run(more, workdir, log=Log())
    found = [row for row in rows(workdir) if row["kind"] == "eval"]
    assert len(found) == 1 and found[0]["more/count"] == 21


ROWS = tiny_config(steps=12, log_steps=5, checkpoint_steps=3, ema=0.9)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    return train.run(ROWS, workdir, log=Log()), workdir


@pytest.mark.thorough
@pytest.mark.parametrize(("line", "kill"), [("step 5/12", True), ("step 10/12", True), ("step 5/12", False)])
def test_the_first_row_after_a_kill_is_of_all_its_steps(straight, tmp_path, line, kill):
    if kill:  # goes on from 3, from 9: between two rows
        with pytest.raises(CrashError):
            train.run(ROWS, tmp_path, log=Log(line, crash))
    else:
        ask = Log(line, functools.partial(os.kill, os.getpid(), signal.SIGTERM))
        assert not train.run(ROWS, tmp_path, log=ask).finished
    log = Log()
    resumed = train.run(ROWS, tmp_path, log=log)
    assert any(text.startswith("resuming") for text in log)
    assert_identical(resumed.state, straight[0].state)
    assert rows(tmp_path) == rows(straight[1])


def test_a_shorter_config_is_explained(straight, tmp_path):
    config = tiny_config(steps=4, checkpoint_steps=2)
    train.run(config, tmp_path, log=Log())
    log = Log()
    result = train.run({**config.to_dict(), "steps": 2}, tmp_path, log=log)
    assert int(result.state.step) == 4
    assert not any("step 4 of 2" in line for line in log)
    assert any("4" in line and "2" in line and "nothing to train" in line for line in log)


@pytest.mark.parametrize(
    ("bad", "every", "said"), [(4, 2, "after step 4"), (1, 2, "after step 2"), (1, 5, "nothing was saved")]
)
def test_the_last_saved_step_is_named(tmp_path, monkeypatch, bad, every, said):
    real = Run.train_batches

    def train_batches(self, start_step, **kwargs):
        for index, batch in enumerate(real(self, start_step, **kwargs), start_step):
            yield {**batch, "mask": batch["mask"] * np.float32(np.nan if index == bad + 1 else 1)}

    monkeypatch.setattr(Run, "train_batches", train_batches)
    bad_step = bad + 2
    with pytest.raises(train.TrainError, match=rf"step {bad_step}: .*{said}"):
        train.run(tiny_config(checkpoint_steps=every), tmp_path, log=Log())


class TestNotFinite:
    """Weights that hold NaN evaluate to an error, and never to what JSON cannot hold."""

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_weights(self, trained, tmp_path, value):
        variables = jax.tree.map(np.array, trained.state.variables)
        variables["params"]["backbone"]["patch_embed"]["proj"]["kernel"][0, 0] = value
        path = tmp_path / "bad.safetensors"
        dyntoken.save_weights(path, variables, model=trained.model)
        with pytest.raises(ValueError, match=r"not finite .*loss") as caught:
            train.evaluate(tiny_config(init={"path": str(path)}), log=Log())
        assert "\n" not in str(caught.value)

    def test_the_set_is_named(self, trained, monkeypatch):
        evaluation = importlib.import_module("dyntoken.train.evaluate")

        fake = {
            "top1": 0.5,
            "loss": 1.0,
            "more/loss": [1.0, float("inf")],
            "more/ema/top1": float("nan"),
            "count": 3,
        }
        monkeypatch.setattr(evaluation, "measure", lambda *_: dict(fake))
        with pytest.raises(ValueError, match=r"\(more/loss, more/ema/top1\)"):
            train.evaluate(tiny_config(), trained.workdir, log=Log())

    def test_the_last_evaluation_of_a_run(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            loop, "measure", lambda *_: {"top1": 0.1, "loss": float("nan"), "per": [1.0, float("inf")]}
        )
        for _ in range(2):  # once run again, too
            with pytest.raises(ValueError, match=r"not finite \(loss, per\)"):
                train.run(tiny_config(steps=2), tmp_path, log=Log())

        def strict(name):
            raise AssertionError(name)

        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        last = [json.loads(line, parse_constant=strict) for line in lines][-1]
        assert last == {"step": 2, "kind": "eval", "top1": 0.1, "loss": None, "per": [1.0, None]}
        assert (tmp_path / "checkpoints" / "2").is_dir()  # nothing is lost


@pytest.mark.parametrize(
    "error",
    [
        ValueError(
            'RESOURCE_EXHAUSTED: Error opening "zarr" driver: Failed to write: No space left on device'
        ),
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
    ],
)
@pytest.mark.parametrize("place", ["save", "wait_until_finished"])
def test_a_full_disk_is_called_one(tmp_path, monkeypatch, error, place):
    def fail(*args, **kwargs):
        raise error

    state = make_state(2, sharding.data_mesh())
    saving = checkpoints.Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.ocp.CheckpointManager, place, fail)
        with pytest.raises(
            OSError, match=r"the disk of .*checkpoints is full.*run the same command again"
        ) as caught:
            saving.save(int(state.step), state)
            saving.wait()
    assert "zarr" not in str(caught.value) and "\n" not in str(caught.value)
    saving.close()


def test_other_errors_of_writing_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes")

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", fail)
    saving = checkpoints.Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="Out of memory"):
        saving.save(2, make_state(2, sharding.data_mesh()))
    saving.close()
