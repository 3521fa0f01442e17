"""Long-run care in real (tiny) runs: best checkpoints, rewinds, further sets, traces, other devices."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken import train
from dyntoken.checkpoints import restore_from
from dyntoken.data import sources
from dyntoken.data.fake import open_fake
from dyntoken.train import loop, sharding
from dyntoken.train.build import Run, build
from dyntoken.train.state import TrainError
from dyntoken.weights import WeightsError
from dyntoken.workdirs import CheckpointError
from tests.train.test_loop import CrashError, Log, assert_identical, crash, rows, steps_kept
from tests.train.tiny import tiny_config

# After a read that failed, TensorStore's threads still answer to the event loop that Orbax has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

config = functools.partial(tiny_config, checkpoint_steps=2, ema=0.9, model__dropout=0.1)
FAKE = {"image_size": 16, "train": 64, "test": 21, "num_classes": 7}


@pytest.fixture(autouse=True, scope="module")
def one_compilation():
    """Many of these runs take the same steps: what lowers to the same program is compiled once."""
    compile_, compiled = jax.stages.Lowered.compile, {}

    def compile_once(lowered, *args, **options):
        program = lowered.as_text()
        if program not in compiled:
            compiled[program] = compile_(lowered, *args, **options)
        return compiled[program]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", compile_once)
        yield


class Several:
    """`fake`, with every class right for every image."""

    def __init__(self, source):
        self.info = dataclasses.replace(source.info, several_labels=True)
        self._source = source

    def evaluate(self, run):
        for batch in self._source.evaluate(run):
            yield {**batch, "labels": np.ones((len(batch["label"]), self.info.num_classes), bool)}


def open_several(name, data_dir=None, *, num_classes, train, test, image_size):
    options = {"num_classes": num_classes, "train": train, "test": test, "image_size": image_size}
    return Several(open_fake(name, data_dir, **options))


@pytest.mark.thorough
def test_sets_trace_picture_and_events(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SOURCES._rows, "several", open_several)
    own = config(
        eval_steps=3,
        curves=True,
        tensorboard=True,
        profile={"start": 4, "steps": 2},
        evals={
            "more": {"name": "fake", "options": FAKE},
            "real": {"name": "several", "split": "test[:9]", "options": FAKE},
        },
    )
    log = Log()
    result = train.run(own, tmp_path, log=log)
    found = result.metrics
    values = {"top1", "top5", "loss"}
    kinds = {f"{kind}{value}" for kind in ("", "ema/") for value in values} | {"count"}
    assert set(found) == {f"{label}{name}" for label in ("", "more/", "real/") for name in kinds}
    assert (found["count"], found["more/count"], found["real/count"]) == (37, 21, 9)
    assert found["real/top1"] == found["real/ema/top1"] == 1.0 > max(found["top1"], found["more/top1"])
    assert {k: v for k, v in rows(tmp_path)[-1].items() if k not in ("step", "kind")} == found
    again = train.evaluate(own, tmp_path, log=Log())
    assert {name: again[name] for name in found} == found
    alone = train.measure(
        dataclasses.replace(result.run, eval_sets=_only(result.run, "more")), *_both(result)
    )
    assert alone["more/loss"] == found["more/loss"]

    assert [line for line in log if line.startswith("traced")] == [
        f"traced steps 4 to 5 into {tmp_path}/profile"
    ]
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    waits = [
        json.loads(line).get("data_wait") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert sum(wait is not None for wait in waits) == 6 and all(0 <= wait <= 1 for wait in waits if wait)


def _only(run, label):
    return {label: run.eval_sets[label]}


def _both(result):
    return result.state.variables, result.state.ema


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"evals": {"v2": {"nme": "fake"}}},
            r"unknown option 'nme' of config.evals.v2: did you mean config.evals.v2.name",
        ),
        ({"evals": {"v2": {"split": "test"}}}, r"config.evals.v2.name is missing"),
        ({"evals": {"ema": {"name": "fake"}}}, r"label 'ema': use a word"),
        ({"evals": {"v2": {"name": "fake", "eval": {"batch": 4}}}}, r"unknown option 'batch'"),
        ({"evals": {"v2": {"name": "fake"}}}, r"config.evals.v2: fake has 10 classes, .* trained on 7"),
        ({"evals": {"v2": {"name": "fake", "split": "tset", "options": FAKE}}}, r"no split 'tset'"),
        ({"evals": {"v2": {"name": "absent_set"}}}, r"absent_set"),
        ({"best_metric": "ema/top1"}, r"config.best_metric is 'ema/top1', .* top1"),
        ({"best_metric": "v2/top1"}, r"config.best_metric is 'v2/top1'"),
        ({"keep_best": -1}, r"config.keep_best is -1"),
        ({"rewind": -1}, r"config.rewind is -1"),
        ({"profile": {"begin": 3}}, r"unknown option 'begin' of config.profile"),
        ({"profile": {"start": 0, "steps": 2}}, r"config.profile.start is 0"),
        ({"profile": {"start": 7, "steps": 2}}, r"config.profile.start is 7, but the run has 6 steps"),
        ({"keep_best": 1}, r"config.keep_best is 1, .* only at its end: set config.eval_epochs"),
    ],
)
def test_errors_say_what_to_do(overrides, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        build(tiny_config(**overrides))
    assert "\n" not in str(caught.value)


def test_a_set_that_is_not_on_disk_ends_the_run_before_it_starts(tmp_path, monkeypatch):
    """Common sets are described without being there: only opening them tells."""
    monkeypatch.setattr(loop, "StepCache", lambda *_: pytest.fail("compiled"))
    card = dataclasses.replace(build(tiny_config()).info, name="imagenet_v2", splits={"test": 9})
    monkeypatch.setattr("dyntoken.data.tfds_source.KNOWN_DATASETS", {"imagenet_v2": card})
    own = tiny_config(evals={"v2": {"name": "imagenet_v2", "data_dir": str(tmp_path / "none")}})
    with pytest.raises((ValueError, OSError), match=r"imagenet_v2.*"):
        train.run(own, tmp_path / "run", log=Log())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


class TestBest:
    SCORES = (0.1, 0.9, 0.2, 0.7, 0.3, 0.4)

    @pytest.fixture
    def scored(self, monkeypatch):
        """Evaluations that say what `SCORES` says, one after the other."""
        calls = iter(self.SCORES)
        monkeypatch.setattr(loop, "measure", lambda *_: {"top1": next(calls), "count": 37})

    @pytest.mark.thorough
    def test_they_outlive_the_newest(self, tmp_path, scored):
        own = config(checkpoint_steps=0, eval_steps=1, keep_best=2, keep_checkpoints=1)
        with pytest.raises(CrashError):
            train.run(own, tmp_path, log=Log("step 4/6", crash))  # within step 4, before its evaluation
        assert steps_kept(tmp_path) == [2, 3]
        log = Log()
        result = train.run(own, tmp_path, log=log)
        assert "resuming at step 3 of 6" in log  # the newest, not the best
        assert steps_kept(tmp_path) == [2, 4, 6]
        assert result.metrics["top1"] == 0.4

        like = result.run.abstract_state
        steps = {which: restore_from(tmp_path, like, step=which).step for which in ("newest", "best", 4)}
        assert steps == {"newest": 6, "best": 2, 4: 4}
        best = restore_from(tmp_path, like, step="best").tree
        loaded = dyntoken.load_weights(result.model, tmp_path, step="best", prefer="params")
        assert_identical(loaded["params"], best.params)
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; it has: 2, 4, 6"):
            restore_from(tmp_path, like, step=3)
        with pytest.raises(
            WeightsError, match=r"step='bset': choose newest, best or one of the steps 2, 4, 6"
        ):
            dyntoken.load_weights(result.model, tmp_path, step="bset")
        found = train.evaluate(own, tmp_path, step="best", log=Log())
        assert found["step"] == 2 and 0 <= found["top1"] <= 1

        # A damaged best one: the next best.
        for file in (tmp_path / "checkpoints" / "2").glob("state/**/d/*"):
            file.write_bytes(b"")
        assert restore_from(tmp_path, like, step="best", log=Log()).step == 4

    def test_nothing_was_evaluated(self, tmp_path, scored):
        result = train.run(config(steps=2), tmp_path, log=Log())
        (tmp_path / "metrics.jsonl").unlink()
        with pytest.raises(
            CheckpointError, match=r"no evaluation of 'top1' at a checkpoint .2.*keep_best > 0"
        ):
            restore_from(tmp_path, result.run.abstract_state, step="best")


REWINDS = config(rewind=2)


@pytest.fixture(scope="class")
def poison():
    real = Run.train_batches

    def train_batches(self, start_step, *, skipped=0, rewinds=0):
        batches = real(self, start_step, skipped=skipped, rewinds=rewinds)
        for index, batch in enumerate(batches, start_step + skipped):
            bad = np.float32(np.nan if index in (0, 4) else 1.0)
            yield {**batch, "mask": batch["mask"] * bad}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "train_batches", train_batches)
        yield real


@pytest.fixture(scope="class")
def straight(poison, tmp_path_factory):
    workdir, log = tmp_path_factory.mktemp("straight"), Log()
    return train.run(REWINDS, workdir, log=log), workdir, log


class TestRewind:
    """Batches 0 and 4 of the data make the loss NaN: from step 1 back to 0, from step 4 to 2."""

    PATH = ((1, 1), (2, 1), (5, 2), (6, 2), (7, 2), (8, 2))  # (batch, rewinds before it) of each step

    def test_the_way_it_takes(self, straight, poison):
        result, workdir, log = straight
        told = [line for line in log if line.startswith("not finite")]
        assert len(told) == 2
        assert "step 1: ce nan" in told[0] and "going back to step 0, rewind 1 of 2" in told[0]
        assert "step 4: ce nan" in told[1] and "going back to step 2, rewind 2 of 2" in told[1]
        assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5, 6, 6]
        found = restore_from(workdir, result.run.abstract_state)
        assert found.meta["rewinds"] == [[0, 1], [2, 4]]

        run, state = result.run, result.run.new_state()
        for batch, rewinds in self.PATH:
            chosen = next(poison(run, batch, rewinds=rewinds))
            assert chosen["id"].tolist() == list(range(16 * rewinds, 16 * rewinds + 16))
            state, _ = run.train_step(state, {}, sharding.place(chosen, run.mesh))
        assert_identical(state, result.state)

    @pytest.mark.parametrize(
        ("line", "kill"),
        [
            ("step 3/6", True),  # after one rewind, with nothing saved since
            pytest.param("not finite at step 4", True, marks=pytest.mark.slow),  # within the second
            ("step 2/6", False),  # SIGTERM: saves step 3, which no rewind goes back to
            pytest.param("step 3/6", False, marks=pytest.mark.slow),  # SIGTERM meets the bad step
        ],
    )
    def test_interrupted_it_takes_the_same(self, straight, tmp_path, line, kill):
        if kill:
            with pytest.raises(CrashError):
                train.run(REWINDS, tmp_path, log=Log(line, crash))
        else:
            ask = Log(line)

            def once():  # the step is logged again after a rewind, and a second signal ends the process
                ask.action = None
                os.kill(os.getpid(), signal.SIGTERM)

            ask.action = once
            assert not train.run(REWINDS, tmp_path, log=ask).finished
        resumed = train.run(REWINDS, tmp_path, log=Log())
        assert_identical(resumed.state, straight[0].state)
        assert rows(tmp_path) == rows(straight[1])

    def test_used_up(self, poison, tmp_path):
        with pytest.raises(TrainError, match=r"step 4: .*it went back 1 times already .config.rewind.*lr"):
            train.run(config(rewind=1), tmp_path, log=Log())
        assert steps_kept(tmp_path) == [2]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A run on four devices that ends, and one that dies at step 3 of 6."""
    whole = train.run(config(), tmp_path_factory.mktemp("whole"), log=Log())
    died = tmp_path_factory.mktemp("died")
    with pytest.raises(CrashError):
        train.run(config(), died, log=Log("step 3/6", crash))
    return whole, died


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_four_devices_then_fewer(four, tmp_path, monkeypatch, devices):
    whole, died = four
    monkeypatch.setattr(loop, "build", functools.partial(build, devices=jax.devices()[:devices]))
    log = Log()
    resumed = train.run(config(resume=str(died)), tmp_path, log=log)
    assert f"going on from step 2 of {died}" in log and resumed.run.mesh.size == devices
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(close, resumed.state.params, whole.state.params)
    jax.tree.map(close, resumed.state.ema, whole.state.ema)
    assert resumed.metrics["top1"] == pytest.approx(whole.metrics["top1"], abs=1 / 37 + 1e-9)
