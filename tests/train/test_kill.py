"""A process killed at random moments, run again and again, ends where an undisturbed one does."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from dyntoken import train
from tests.train.tiny import long_config, series_config

STEPS = 150
ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(workdir: pathlib.Path, which: str = str(STEPS)) -> subprocess.Popen:
    with (workdir.parent / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.train.tiny", str(workdir), which],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )


def last_step(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_after(process: subprocess.Popen, workdir: pathlib.Path, step: int, delay: float) -> None:
    """Waits until a step is reported, a little longer, and sends SIGKILL."""
    kill_when(process, workdir, lambda: last_step(workdir) >= step, delay)


def wait_for(process: subprocess.Popen, workdir: pathlib.Path, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not reached():
        assert process.poll() is None, (workdir.parent / "output.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_when(
    process: subprocess.Popen, workdir: pathlib.Path, reached: Callable[[], bool], delay: float
) -> None:
    wait_for(process, workdir, reached)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.thorough
def test_killed_three_times(tmp_path):
    draw = random.Random(0)
    workdir = tmp_path / "killed"
    for kill in range(3):
        # Anywhere within a third of the run, so also within the writing of a checkpoint.
        step = draw.randrange(kill * STEPS // 3 + 8, (kill + 1) * STEPS // 3 - 8)
        kill_after(start(workdir), workdir, step, delay=draw.uniform(0.0, 0.05))
    lines = []
    killed = train.run(long_config(STEPS), workdir, log=lines.append)
    resumed = [line for line in lines if line.startswith("resuming at step")]
    assert resumed and 0 < int(resumed[0].split()[3]) < STEPS

    straight = train.run(long_config(STEPS), tmp_path / "straight", log=lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, killed.state, straight.state)
    assert killed.metrics == straight.metrics
    steps = [row.split(",")[0] for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps[:-1] == [f'{{"step": {i}' for i in range(1, STEPS + 1)]  # none twice, none missing


def rows(workdir: pathlib.Path) -> list[dict]:
    """What was recorded, without what depends on the clock."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # killed while writing
        found.append({k: v for k, v in row.items() if k not in ("seconds", "images_per_s", "data_wait")})
    return found


def finished(workdir: pathlib.Path) -> list[int]:
    """Steps of the checkpoints that are complete."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def unfinished(workdir: pathlib.Path) -> set[str]:
    folder = workdir / "checkpoints"
    return {p.name for p in folder.iterdir() if not p.name.isdigit()} if folder.exists() else set()


def resumptions(workdir: pathlib.Path) -> list[int]:
    lines = (workdir.parent / "output.txt").read_text().splitlines()
    return [int(line.split()[3]) for line in lines if line.startswith("resuming at step")]


MOMENTS = {
    "train": 4,
    "save": 4,
    "start": 2,
    "restore": 3,
    "evaluate": 2,
    "twice": 2,
    "SIGTERM": 3,
    "SIGINT": 3,
}


@pytest.mark.slow
def test_killed_twenty_five_times(tmp_path):
    """While starting, training, saving, restoring, evaluating and in the last evaluation: the end is the same."""
    draw, workdir, last = random.Random(1), tmp_path / "killed", series_config().steps
    moments = [moment for moment, times in MOMENTS.items() for _ in range(times)]
    draw.shuffle(moments)
    hits = dict.fromkeys(("save", "evaluate", "restore", "end"), 0)
    (tmp_path / "output.txt").touch()
    for moment in [*moments, "end", "end"]:
        for part in ["train", "start"] if moment == "twice" else [moment]:
            newest, seen = max(finished(workdir), default=0), len(resumptions(workdir))
            process = start(workdir, "series")
            _kill(process, part, workdir, last, draw, hits)
            went_on = resumptions(workdir)[seen:]
            # From the newest complete checkpoint, unless it was killed before that.
            assert went_on in ([], [newest]), moment
    print(f"{len(moments) + 4} kills, {hits} in the act, resumed at {resumptions(workdir)}")
    assert hits["save"] >= 2 and min(hits.values()) >= 1
    assert "Traceback" not in (tmp_path / "output.txt").read_text()

    killed = train.run(series_config(), workdir, log=lambda line: None)
    straight = train.run(series_config(), tmp_path / "straight", log=lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, killed.state, straight.state)
    assert killed.metrics == straight.metrics
    assert rows(workdir) == rows(tmp_path / "straight")
    assert finished(workdir)[-1] == finished(tmp_path / "straight")[-1]


def _kill(
    process: subprocess.Popen, moment: str, workdir: pathlib.Path, last: int, draw: random.Random, hits: dict
) -> None:
    """One kill; `hits` counts those that met what they were meant for."""
    trained, partial, sessions = _trained(workdir), unfinished(workdir), len(resumptions(workdir))
    if moment == "start":
        kill_when(process, workdir, lambda: True, draw.uniform(1.0, 8.0))
    elif moment == "train":
        step = trained + draw.randrange(2, 14)
        kill_when(process, workdir, lambda: _trained(workdir) >= step, draw.uniform(0, 0.05))
    elif moment == "save":
        kill_when(process, workdir, lambda: bool(unfinished(workdir) - partial), draw.uniform(0, 0.02))
        hits["save"] += bool(unfinished(workdir) - partial)
    elif moment == "restore":
        before = _announced(workdir, "restoring")
        kill_when(process, workdir, lambda: _announced(workdir, "restoring") > before, draw.uniform(0, 0.1))
        hits["restore"] += len(resumptions(workdir)) == sessions
    elif moment == "evaluate":
        step, before = (trained // 100 + 1) * 100, _announced(workdir, "evaluating")

        def measuring() -> bool:
            return _trained(workdir) >= step and _announced(workdir, "evaluating") > before

        kill_when(process, workdir, measuring, draw.uniform(0, 0.05))
        hits["evaluate"] += not _evaluated(workdir, step)
    elif moment in ("SIGTERM", "SIGINT"):
        _stop(process, workdir, trained + draw.choice((0, 2, 9)), signal.Signals[moment], draw)
    else:
        before = _announced(workdir, "evaluating")

        def evaluating() -> bool:
            return last in finished(workdir) and _announced(workdir, "evaluating") > before

        kill_when(process, workdir, evaluating, draw.uniform(0, 0.05))
        hits["end"] += not _evaluated(workdir, last)


def _stop(
    process: subprocess.Popen, workdir: pathlib.Path, step: int, signum: int, draw: random.Random
) -> None:
    """A signal that asks: once training, the step it stops at is saved; before, it ends at once."""
    if step == _trained(workdir):
        time.sleep(draw.uniform(1.0, 5.0))
    else:
        wait_for(process, workdir, lambda: _trained(workdir) >= step)
    process.send_signal(signum)
    assert process.wait(300) == 128 + signum
    if (
        _trained(workdir) >= step > 0
        and "stopped" in (workdir.parent / "output.txt").read_text().splitlines()[-1]
    ):
        assert max(finished(workdir)) == _trained(workdir)


def _announced(workdir: pathlib.Path, word: str) -> int:
    return (workdir.parent / "output.txt").read_text().splitlines().count(word)


def _trained(workdir: pathlib.Path) -> int:
    return max((row["step"] for row in rows(workdir) if row["kind"] == "train"), default=0)


def _evaluated(workdir: pathlib.Path, step: int) -> bool:
    return any(row["step"] == step and row["kind"] == "eval" for row in rows(workdir))
