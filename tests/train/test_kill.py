"""A process killed at random moments, run again and again, ends where an undisturbed one does."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from dyntoken import train
from tests.train.tiny import long_config

STEPS = 150
ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(workdir: pathlib.Path) -> subprocess.Popen:
    with (workdir.parent / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.train.tiny", str(workdir), str(STEPS)],
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
    deadline = time.monotonic() + 600
    while last_step(workdir) < step:
        assert process.poll() is None, (workdir.parent / "output.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


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
