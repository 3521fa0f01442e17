"""The loop: reruns, interruptions, faults, and errors that say what to do."""

from __future__ import annotations

import json
import os
import signal

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken import train
from dyntoken.checkpoints import restore_from
from dyntoken.train import loop
from dyntoken.workdirs import CheckpointError
from tests.train.tiny import DTPS, SMALL, tiny_config

# After a read that failed, TensorStore's threads still answer to the event loop that Orbax has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class CrashError(Exception):
    """Stands for whatever ends a run."""


class Log(list):
    """Collects lines; runs `action` when one starts with `prefix`."""

    def __init__(self, prefix: str = "", action=None):
        self.prefix, self.action = prefix, action

    def __call__(self, line: str) -> None:
        self.append(line)
        if self.action is not None and line.startswith(self.prefix):
            self.action()


def crash():
    raise CrashError


def rows(workdir):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_s", "data_wait")} for row in lines
    ]


def steps_kept(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


PARAMETERS = 2543
CONFIG = tiny_config(checkpoint_steps=2, eval_steps=3, ema=0.9, model__dropout=0.1)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run: (result, workdir, lines)."""
    workdir, log = tmp_path_factory.mktemp("straight"), Log()
    return train.run(CONFIG, workdir, log=log), workdir, log


@pytest.mark.thorough
def test_what_a_run_leaves_behind(straight):
    result, workdir, log = straight
    assert log[0] == "devices: 4 x cpu, virtual devices that share this machine's cores"
    assert result.finished and int(result.state.step) == 6
    assert result.metrics["count"] == 37
    assert set(result.metrics) == {"top1", "top5", "loss", "count", "ema/top1", "ema/top5", "ema/loss"}
    assert [(row["step"], row["kind"]) for row in rows(workdir)] == [
        *((s, "train") for s in (1, 2, 3)),
        (3, "eval"),
        *((s, "train") for s in (4, 5, 6)),
        (6, "eval"),
    ]
    assert steps_kept(workdir) == [4, 6]
    assert rows(workdir)[0]["lr"] == pytest.approx(1e-3)
    line = next(line for line in log if line.startswith("step 3/6"))
    for part in ("50.0%", "img/s", "data ", "ETA", "lr 0.00075", "ce ", "grad_norm "):
        assert part in line
    assert json.loads((workdir / "config.json").read_text())["optim"] == {"clip": 1.0, "lr": 1e-3}
    out = result.model.apply(result.state.variables, np.zeros((2, 16, 16, 3), np.float32))
    assert out.logits.shape == (2, 7)


def test_a_rerun_does_nothing(straight, monkeypatch):
    result, workdir, _ = straight
    before = (workdir / "metrics.jsonl").read_text()
    monkeypatch.setattr(loop, "StepCache", lambda *_: pytest.fail("compiled a finished run"))
    monkeypatch.setattr(loop, "measure", lambda *_: pytest.fail("evaluated a finished run"))
    log = Log()
    again = train.run(CONFIG, workdir, log=log)
    assert again.finished and again.metrics == result.metrics
    assert_identical(again.state, result.state)
    assert (workdir / "metrics.jsonl").read_text() == before
    assert any("nothing to do" in line for line in log)


def test_evaluate_reads_the_workdir(straight):
    result, workdir, _ = straight
    found = train.evaluate(CONFIG, workdir, log=Log())
    assert {name: found[name] for name in result.metrics} == result.metrics
    assert found["step"] == 6 and found["images_per_s"] > 0


@pytest.mark.parametrize("at", [2, 3, 5])
def test_crash_and_rerun_equal_no_crash(straight, tmp_path, at):
    """Before any checkpoint of its own age, right after one, and between two."""
    with pytest.raises(CrashError):
        train.run(CONFIG, tmp_path, log=Log(f"step {at}/6", crash))
    resumed = train.run(CONFIG, tmp_path, log=Log())
    assert_identical(resumed.state, straight[0].state)
    assert resumed.metrics == straight[0].metrics
    assert rows(tmp_path) == rows(straight[1])  # no step twice, none missing


def test_killed_during_the_last_evaluation(straight, tmp_path, monkeypatch):
    config = tiny_config(checkpoint_steps=2, ema=0.9, model__dropout=0.1)
    with pytest.raises(CrashError), monkeypatch.context() as patch:
        patch.setattr(loop, "measure", lambda *_: crash())
        train.run(config, tmp_path, log=Log())
    monkeypatch.setattr(loop, "StepCache", lambda *_: pytest.fail("trained a finished run"))
    again = train.run(config, tmp_path, log=Log())
    assert again.finished and again.metrics == straight[0].metrics


def ask():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("line", "step"),
    [("step 4/6", 5), ("step 2/6", 3), ("step 3/6", 3), ("eval at step 3/6", 3)],
    ids=["training", "before an evaluation", "at its start", "at its end"],
)
def test_sigterm_saves_and_stops(straight, tmp_path, line, step):
    """An evaluation that a stop came before is made up for, once; no step is taken after one."""
    log = Log(line, ask)
    stopped = train.run(CONFIG, tmp_path, log=log)
    assert not stopped.finished and stopped.metrics == {}
    assert steps_kept(tmp_path)[-1] == int(stopped.state.step) == step
    assert f"stopped by a signal after step {step}" in log[-1]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [row["step"] for row in rows(tmp_path)][-1] == step
    log = Log()
    assert_identical(train.run(CONFIG, tmp_path, log=log).state, straight[0].state)
    assert rows(tmp_path) == rows(straight[1])
    assert any(said.startswith("evaluating step 3") for said in log) == (line in ("step 2/6", "step 3/6"))


@pytest.mark.thorough
def test_an_evaluation_that_is_owed_may_be_stopped_and_killed(straight, tmp_path, monkeypatch):
    owed = "evaluating step 3"
    assert not train.run(CONFIG, tmp_path, log=Log("step 3/6", ask)).finished
    with monkeypatch.context() as patch:  # asked again while it makes up for it
        measure = loop.measure
        patch.setattr(loop, "measure", lambda *args, **more: (ask(), measure(*args, **more))[1])
        stopped = train.run(CONFIG, tmp_path, log=Log())
    assert not stopped.finished and int(stopped.state.step) == 3 and rows(tmp_path)[-1]["kind"] == "train"
    log = Log("compiling", crash)
    with pytest.raises(CrashError):  # made up for, then killed
        train.run(CONFIG, tmp_path, log=log)
    assert any(line.startswith(owed) for line in log)
    log = Log()
    assert_identical(train.run(CONFIG, tmp_path, log=log).state, straight[0].state)
    assert rows(tmp_path) == rows(straight[1]) and not any(line.startswith(owed) for line in log)


@pytest.mark.thorough
def test_a_damaged_newest_checkpoint_costs_two_steps(straight, tmp_path):
    with pytest.raises(CrashError):
        train.run(CONFIG, tmp_path, log=Log("step 5/6", crash))
    for file in (tmp_path / "checkpoints" / "4").glob("state/**/d/*"):
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    log = Log()
    result = train.run(CONFIG, tmp_path, log=log)
    assert any("checkpoint 4" in line and "damaged" in line for line in log)
    assert any(line.startswith("resuming at step 2") for line in log)
    assert_identical(result.state, straight[0].state)
    assert rows(tmp_path) == rows(straight[1])


@pytest.mark.thorough
def test_not_finite_names_step_and_norm_and_saves_nothing(tmp_path):
    config = tiny_config(checkpoint_steps=1, optim={"lr": 1e12, "warmup_steps": 3})
    with pytest.raises(
        train.TrainError, match=r"not finite at step 3: .*grad_norm nan.* after step 2 was saved"
    ):
        train.run(config, tmp_path, log=Log())
    assert steps_kept(tmp_path) == [1, 2]
    with pytest.raises(train.TrainError, match=r"at step 3"):  # the same again, from what was saved
        train.run(config, tmp_path, log=Log())
    state = restore_from(tmp_path, train.build(config).abstract_state).tree
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_going_on_from_another_run(straight, tmp_path):
    """Another length, another folder; the source stays as it was."""
    _, source, _ = straight
    before = steps_kept(source)
    config = tiny_config(ema=0.9, model__dropout=0.1, steps=8, resume=str(source))
    log = Log()
    result = train.run(config, tmp_path, log=log)
    assert int(result.state.step) == 8 and steps_kept(source) == before and steps_kept(tmp_path) == [8]
    assert any("going on from step 6" in line for line in log)
    assert any("steps 6 -> 8" in line for line in log)
    with pytest.raises(CheckpointError, match="no checkpoints in"):
        train.run(tiny_config(resume=str(tmp_path / "nowhere")), tmp_path / "new", log=Log())


@pytest.mark.thorough
def test_fine_tuning_with_a_teacher(straight, tmp_path):
    """The paper's main path: a dense run gives the initial weights and the teacher."""
    result, source, _ = straight
    weights = tmp_path / "dense.safetensors"
    dyntoken.save_weights(weights, result.state.variables, model=result.model)
    config = tiny_config(
        steps=2,
        model={"name": DTPS, "keep": 0.5, "at": (0,), **SMALL},
        losses={"ce": {}, "keep_ratio": {"weight": 2.0}, "logit_kl": {"weight": 0.5}},
        teacher={"name": "deit_tiny_patch8_16", "weights": str(source), **SMALL},
        init={"path": str(weights)},
    )
    log = Log()
    tuned = train.run(config, tmp_path / "run", log=log)
    assert {"ce", "keep_ratio", "logit_kl", "loss"} < set(rows(tmp_path / "run")[0])
    assert any(line.startswith("initial weights:") for line in log)
    assert any(line.startswith("teacher:") for line in log)
    a = tuned.state.params["backbone"]["patch_embed"]["proj"]["kernel"]
    b = result.state.params["backbone"]["patch_embed"]["proj"]["kernel"]
    assert 0 < np.abs(np.asarray(a) - np.asarray(b)).max() < 0.01  # moved a little, not started anew
    found = train.evaluate(config, tmp_path / "run", log=Log())
    assert found["top1"] == tuned.metrics["top1"]


def test_evaluate_initial_weights(straight, tmp_path):
    result, _, _ = straight
    weights = tmp_path / "dense.safetensors"
    dyntoken.save_weights(weights, result.state.variables, model=result.model)
    named = tiny_config(init={"path": str(weights)})
    found = train.evaluate(named, log=Log())
    assert found["top1"] == result.metrics["top1"] and "step" not in found
    for config, workdir, step, message in (
        (named, tmp_path, "newest", f"no checkpoint in {tmp_path}"),  # never the start of a run for the run
        (named, tmp_path / "absent", "newest", "--workdir of a run"),
        (tiny_config(), None, "newest", "--config.init.path=WEIGHTS"),
        (named, None, "best", "--step=best"),
    ):
        with pytest.raises(ValueError, match=message):
            train.evaluate(config, workdir, step=step, log=Log())
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model__name": DTPS, "model__depth": 2, "model__at": (1,)}, "blocks_1"),  # and a fresh predictor
        ({"init__head": "reset"}, "head/"),
        ({"model__depth": 2}, "blocks_1"),
    ],
)
def test_weights_that_leave_anything_fresh_are_not_evaluated(straight, tmp_path, changes, named):
    result, _, _ = straight
    weights = tmp_path / "dense.safetensors"
    dyntoken.save_weights(weights, result.state.variables, model=result.model)
    with pytest.raises(ValueError, match=named):
        train.evaluate(tiny_config(init__path=str(weights), **changes), log=Log())


def test_dry_run_needs_no_weights(tmp_path):
    config = tiny_config(
        epochs=3.0,
        steps=0,
        eval_epochs=0.5,
        model__name="deit_tiny_patch8_16",
        losses={"ce": {}, "logit_kl": {}},
        teacher={"name": "deit_tiny_patch8_16", "weights": str(tmp_path / "absent.npz"), **SMALL},
        init={"path": str(tmp_path / "absent.npz")},
    )
    facts = train.dry_run(config, log=Log())
    assert facts["steps_per_epoch"] == 4 and facts["steps"] == 12 and facts["eval_every"] == 2
    assert facts["parameters"] == PARAMETERS
    assert facts["memory_bytes"] > facts["state_bytes"] > 3 * 4 * PARAMETERS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"leraning_rate": 1}, r"unknown option 'leraning_rate' of config: "),
        ({"epoch": 1}, r"unknown option 'epoch' of config: did you mean config.epochs"),
        ({"optim__warmup": 1}, r"unknown option 'warmup' of config.optim: did you mean config.optim.warmup_"),
        ({"mix__mixp": 1}, r"unknown option 'mixp' of config.mix: did you mean .*mixup"),
        ({"mix__num_classes": 1}, r"unknown option 'num_classes' of config.mix"),
        ({"data__eval_split": "validation"}, r"has no split 'validation'"),
        ({"data__eval__batch": 6}, r"batch of 6 does not divide over 4 devices"),
        ({"data__splt": "train"}, r"unknown option 'splt' of config.data: did you mean .*split"),
        (
            {"data__eval__crop": 1},
            r"unknown option 'crop' of config.data.eval: did you mean config.data.eval.crop_pct",
        ),
        (
            {"data__augment__flipp": 1},
            r"unknown option 'flipp' of config.data.augment: did you mean config.data.augment.flip",
        ),
        ({"data__options__trian": 1}, r"trian.*train"),
        ({"data__name": "fakes"}, r"fakes"),
        ({"model__widht": 1}, r"unknown option 'widht' of config.model: did you mean config.model.width"),
        ({"model__name": "dpts_deit_tiny_patch8_16"}, r"did you mean dtps"),
        ({"model__keep": 0.5}, r"is dense and takes no 'keep'"),
        ({"model__num_classes": 3}, r"config.model takes images .* of 3 classes.* of 7"),
        ({"losses__ec": {}}, r"unknown loss 'ec'"),
        (
            {"losses__ce__wieght": 1},
            r"unknown option 'wieght' of config.losses.ce: did you mean config.losses.ce.weight",
        ),
        ({"losses__logit_kl": {}}, r"'logit_kl' needs a teacher: set config.teacher.name"),
        ({"teacher": {"name": "deit_tiny_patch8_16", "weights": "x"}}, r"no loss reads it"),
        ({"init__pth": "x"}, r"unknown option 'pth' of config.init: did you mean config.init.path"),
        ({"init__path": "absent.npz"}, r"absent.npz"),
        ({"batch": 20}, r"batch of 20 does not divide over 4 devices in groups of 2"),
        ({"batch": 24, "data__shards": 5}, r"24 .*5 .*shards"),
        ({"batch": 128}, r"128.*64"),
        ({"steps": 0}, r"no length: set config.epochs"),
        ({"ema": 1.0}, r"config.ema is 1.0"),
        ({"log_steps": 0}, r"config.log_steps is 0"),
        ({"keep_checkpoints": 0}, r"config.keep_checkpoints is 0"),
        ({"optim__name": "adam"}, r"config.optim.name is 'adam': did you mean adamw"),
    ],
)
def test_errors_say_what_to_do(tmp_path, overrides, message):
    with pytest.raises((ValueError, KeyError), match=message) as caught:
        train.run(tiny_config(**overrides), tmp_path, log=Log())
    assert "\n" not in str(caught.value)


def test_missing_sections(tmp_path):
    config = tiny_config().to_dict()
    del config["losses"]
    with pytest.raises(ValueError, match=r"config\.losses is missing"):
        train.run(config, tmp_path)


def test_another_model_in_the_workdir(straight):
    with pytest.raises(CheckpointError, match=r"holds another run: .*use another workdir"):
        train.run(tiny_config(ema=0.9, model__width=16), straight[1], log=Log())
