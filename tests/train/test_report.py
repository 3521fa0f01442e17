"""Reports: one line a step, none twice, and a clock that pauses."""

from __future__ import annotations

import json
import struct
import sys

import jax.numpy as jnp
import pytest
from etils import epath

from dyntoken.analysis import figures
from dyntoken.train import logging
from dyntoken.train.logging import Clock, MetricBuffer, NotFiniteError, Report, duration
from dyntoken.train.writers import TensorBoard, WeightsAndBiases


@pytest.fixture
def now(monkeypatch):
    """A clock set by hand."""
    time = [100.0]
    monkeypatch.setattr(logging.time, "monotonic", lambda: time[0])
    return time


def test_duration():
    assert [duration(s) for s in (0.4, 59, 60, 245, 3600, 11520, float("inf"))] == [
        "0s",
        "59s",
        "1m00s",
        "4m05s",
        "1h00m",
        "3h12m",
        "?",
    ]


def test_clock_counts_training_only(now):
    clock = Clock()
    clock.add(50.0)
    clock.start(step=10)
    now[0] += 4.0
    with clock:
        now[0] += 1000.0  # an evaluation
    now[0] += 1.0
    assert clock.seconds == 55.0
    assert clock.lap(20) == (2.0, 0.0)  # 10 steps in 5 s
    now[0] += 2.0
    assert clock.lap(21) == (0.5, 0.0)  # since the last call only


class Slow:
    """Batches of which some are late: (seconds until it is there, batch)."""

    def __init__(self, now, *batches):
        self.now, self.batches = now, list(batches)

    def ready(self):
        return self.batches[0][0] == 0.0

    def __next__(self):
        seconds, batch = self.batches.pop(0)
        self.now[0] += seconds
        return batch


class Running:
    """A result that is there after some seconds of waiting."""

    def __init__(self, now, seconds):
        self.now, self.seconds = now, seconds

    def block_until_ready(self):
        self.now[0] += self.seconds


def test_only_idle_time_is_waiting_for_data(now):
    clock, batches = Clock(), Slow(now, (0.0, "a"), (3.0, "b"))
    clock.start(step=0)
    assert clock.take(batches, Running(now, 5.0)) == "a"  # there at once: nobody looks at the step
    now[0] += 2.0
    assert clock.take(batches, Running(now, 5.0)) == "b"  # 5 s are the step's, 3 s the data's
    assert clock.lap(2) == (0.2, 0.3)
    now[0] += 1.0
    assert clock.lap(3) == (1.0, 0.0)


def test_a_clock_that_starts_again_goes_on(now):
    clock = Clock()
    clock.start(step=0)
    now[0] += 4.0
    clock.start(step=2)  # after a rewind
    now[0] += 1.0
    assert clock.seconds == 5.0 and clock.lap(3) == (1.0, 0.0)


def metrics_of(clock, total=200, every=50):
    """A buffer for batches of 32 and a learning rate of 5e-4."""
    clock.start(0)
    return MetricBuffer(clock, every=every, total=total, batch=32, lr_fn=lambda step: 5e-4)


def step(step, values, metrics, *others):
    """A step with such metrics of one example, as all observers hear of it."""
    pairs = {name: (jnp.asarray(value), jnp.ones(())) for name, value in values.items()}
    for observer in (metrics, *others):
        observer.step(step, pairs)


def test_lines(tmp_path, now):
    lines, metrics = [], metrics_of(Clock())
    reports = Report(epath.Path(tmp_path), total=200, metrics=metrics, log=lines.append)
    now[0] += 10.0
    step(49, {"ce": 1.0, "loss": 1.0}, metrics, reports)
    assert metrics.row is None and not lines
    step(50, {"ce": 1.5, "loss": 3.0}, metrics, reports)
    assert lines == ["step 50/200  25.0%  160 img/s  data 0%  ETA 30s  lr 0.0005  loss 2 (ce 1.25)"]
    expected = {"step": 50, "kind": "train", "ce": 1.25, "loss": 2.0, "lr": 5e-4}
    assert reports.rows() == [expected | {"images_per_s": 160.0, "data_wait": 0.0, "seconds": 10.0}]
    reports.eval(50, {"top1": 0.25, "count": 37})
    assert lines[1] == "eval at step 50/200  top1 25.00%  count 37"
    reports.eval(50, {"top1": 0.5, "count": 37})
    assert reports.evaluated(50) == {"top1": 0.5, "count": 37}
    assert reports.evaluated(100) is None


def test_what_is_not_finite_is_named_one_step_later_or_at_a_report(now):
    metrics = metrics_of(Clock(), every=3)
    step(1, {"ce": float("nan")}, metrics)
    with pytest.raises(NotFiniteError, match="not finite at step 1: ce nan"):
        step(2, {"ce": 1.0}, metrics)
    metrics.resume(1, {"sums": {"ce": [2.0, 1.0]}})  # of a checkpoint between two reports
    step(2, {"ce": 1.0}, metrics)
    assert metrics.meta == {"sums": {"ce": [2.0, 1.0]}}
    metrics.flush()
    assert metrics.meta == {"sums": {"ce": [3.0, 2.0]}}
    with pytest.raises(NotFiniteError, match="at step 3: ce inf"):
        step(3, {"ce": float("inf")}, metrics)


def test_lines_of_a_model_with_exits(tmp_path, now):
    lines, metrics = [], metrics_of(Clock())
    reports = Report(epath.Path(tmp_path), total=200, metrics=metrics, log=lines.append)
    now[0] += 10.0
    values = {
        "ce": 3.0,
        "ce_per_exit": [1.25, 0.875, 0.5],
        "keep_ratio": 0.0625,
        "loss": 3.125,
        "grad_norm": 2.0,
    }
    step(50, values, metrics, reports)
    assert lines[0].endswith(
        "  loss 3.125 (ce 3, ce_per_exit 1.25/0.875/0.5, keep_ratio 0.0625)  grad_norm 2"
    )
    metrics = {"top1": 0.5, "top1_per_exit": [0.25, 0.375, 0.5], "loss": 1.25, "count": 8}
    reports.eval(50, metrics)
    assert lines[1] == (
        "eval at step 50/200  top1 50.00%  top1_per_exit 25.00/37.50/50.00%  loss 1.25  count 8"
    )
    assert reports.evaluated(50) == metrics and reports.rows()[0]["ce_per_exit"] == [1.25, 0.875, 0.5]


def test_resume_forgets_what_came_after(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "kind": "train"} for s in (10, 20, 30)]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 40, "ki')
    reports = Report(epath.Path(tmp_path), total=100)
    reports.resume(20, {})
    assert path.read_text() == '{"step": 10, "kind": "train"}\n{"step": 20, "kind": "train"}\n'
    reports.resume(0, {})
    assert path.read_text() == ""


def points(folder):
    """(name, step) -> value of all event files, as TensorBoard shows them."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    shown = {}
    for file in sorted(folder.iterdir()):
        raw = file.read_bytes()
        while raw:
            size = struct.unpack("<Q", raw[:8])[0]
            event = event_pb2.Event.FromString(raw[12 : 12 + size])
            raw = raw[16 + size :]
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in shown, "a point twice"
                shown[value.tag, event.step] = value.simple_value
    return shown


def test_the_board_holds_every_point_once(tmp_path, now):
    def session(first, last, loss):
        clock = Clock()
        metrics = metrics_of(clock, total=4, every=1)
        observers = metrics, TensorBoard(epath.Path(tmp_path), metrics)
        for observer in observers:
            observer.resume(first, {})
        clock.start(first)
        for number in range(first + 1, last + 1):
            now[0] += 1.0
            step(number, {"loss": loss, "ce_per_exit": [1.0, 2.0]}, *observers)
        observers[1].eval(last, {"top1": 0.25, "ema/top1": 0.5})
        observers[1].close()

    session(0, 3, loss=1.0)  # killed after step 3, the last checkpoint is of step 2
    session(2, 4, loss=2.0)
    shown = points(tmp_path / "tensorboard")
    losses = {step: value for (name, step), value in shown.items() if name == "train/loss"}
    assert losses == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0}
    assert {key: value for key, value in shown.items() if key[0].startswith("eval")} == {
        ("eval/top1", 4): 0.25,
        ("eval/ema/top1", 4): 0.5,
    }
    assert shown["train/ce_per_exit/1", 4] == 2.0 and shown["train/lr", 1] == pytest.approx(5e-4)


def test_a_board_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(
        ImportError, match=r"needs tensorboardX: install it with .*pip install tensorboardX"
    ) as e:
        TensorBoard(epath.Path(tmp_path), metrics_of(Clock()))
    assert "\n" not in str(e.value)


def test_a_picture_at_every_evaluation_if_there_is_matplotlib(tmp_path, monkeypatch):
    lines = []
    reports = Report(epath.Path(tmp_path), total=4, curves=True, log=lines.append)
    reports.eval(2, {"top1": 0.25})
    first = (tmp_path / "curves.png").read_bytes()
    reports.eval(4, {"top1": 0.5})
    assert first.startswith(b"\x89PNG") and (tmp_path / "curves.png").read_bytes() != first

    def absent(name):
        raise ModuleNotFoundError("drawing needs matplotlib: pip install matplotlib")

    monkeypatch.setattr(figures, "matplotlib", absent)
    reports.eval(5, {"top1": 0.5})
    reports.eval(6, {"top1": 0.5})
    assert [line for line in lines if "matplotlib" in line] == [
        "no curves.png: drawing needs matplotlib: pip install matplotlib"
    ]


class Service:
    """Stands for `wandb`: what it was asked for, and what was logged."""

    def __init__(self):
        self.asked, self.rows, self.finished = [], [], 0
        self.Settings = dict

    def init(self, **options):
        self.asked.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_points_with_their_step(tmp_path, now, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    workdir, known = epath.Path(tmp_path / "mine"), {"project": "p", "config": {"batch": 4}}
    clock = Clock()
    metrics = metrics_of(clock, total=4, every=2)
    writer = WeightsAndBiases(workdir, metrics, **known)
    for observer in (metrics, writer):
        observer.resume(0, {})
    clock.start(0)
    for number in (1, 2):
        now[0] += 1.0
        step(number, {"loss": float(number)}, metrics, writer)
    writer.eval(2, {"top1": 0.25, "top1_per_exit": [0.2, 0.3]})
    writer.close()
    assert service.rows[0]["step"] == 2 and service.rows[0]["train/loss"] == 1.5
    assert service.rows[1] == {
        **{"step": 2, "eval/top1": 0.25, "eval/top1_per_exit/0": 0.2, "eval/top1_per_exit/1": 0.3}
    }
    WeightsAndBiases(workdir, metrics, **known)
    first, again = service.asked
    assert first["id"] == again["id"] and first["resume"] == "allow" and first["dir"] == str(workdir)
    assert first["name"] == "mine" and first["config"] == {"batch": 4} and service.finished == 1
    with pytest.raises(ValueError, match=r"config.wandb writes beside the run"):
        WeightsAndBiases(epath.Path("gs://bucket/run"), metrics, **known)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"needs wandb: install it with `pip install wandb`"):
        WeightsAndBiases(workdir, metrics, **known)


@pytest.mark.slow  # starts the service of wandb
def test_weights_and_biases_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    metrics = metrics_of(Clock())
    for session in range(2):
        writer = WeightsAndBiases(epath.Path(tmp_path), metrics, project="p", config={"batch": 4})
        writer.eval(2 - session, {"top1": 0.25})  # the step may fall
        writer.close()
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) >= 1
