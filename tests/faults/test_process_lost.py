"""A process that is lost, or leaves, ends the other one in one line that names it, in bounded time."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOST_AFTER = 4
RECIPE = """
from tests.train.tiny import tiny_config


def get_config(arg=None):
    return tiny_config(steps=100000, checkpoint_steps=50)
"""


@contextlib.contextmanager
def two(tmp_path):
    """Two processes of `dyntoken.main` in training: (process, its stdout, its stderr) of each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    (tmp_path / "recipe.py").write_text(RECIPE)
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags.append("--xla_force_host_platform_device_count=1")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags), "PYTHONUNBUFFERED": "1"}
    env.pop("TF_CPP_MIN_LOG_LEVEL", None)  # the tests' own
    words = ["--config=recipe.py", "--workdir=run", f"--coordinator=localhost:{port}", "--processes=2"]
    words.append(f"--lost_after={LOST_AFTER}")
    made = []
    try:
        for index in range(2):
            out, err = tmp_path / f"out{index}.txt", tmp_path / f"err{index}.txt"
            with out.open("w") as stdout, err.open("w") as stderr:
                command = [sys.executable, "-m", "dyntoken.main", *words, f"--process={index}"]
                process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=stdout, stderr=stderr)
            made.append((process, out, err))
        deadline = time.monotonic() + 240
        while "step 60/" not in made[0][1].read_text():
            assert all(process.poll() is None for process, _, _ in made), made[0][2].read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield made
    finally:
        for process, _, _ in made:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_one_is_lost(tmp_path, victim, signum):
    with two(tmp_path) as made:
        other, out, err = made[1 - victim]
        began = time.monotonic()
        made[victim][0].send_signal(signum)
        assert other.wait(60) == 1
        assert time.monotonic() - began < 2 * LOST_AFTER + 8
    said = err.read_text().splitlines()
    assert len(said) == 1 and f"process {victim} was lost" in said[0] and "same command again" in said[0]
    assert "Gloo" not in out.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_ctrl_c_to_one_stops_both_at_one_step(tmp_path, asked):
    with two(tmp_path) as made:
        made[asked][0].send_signal(signal.SIGINT)
        codes = [process.wait(60) for process, _, _ in made]
    assert codes[asked] == 130 and codes[1 - asked] == 143
    assert all(err.read_text() == "" for _, _, err in made)
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"after step {steps[-1]}" in made[0][1].read_text().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_second_ctrl_c_to_one_ends_both_without_a_stack_dump(tmp_path, asked):
    with two(tmp_path) as made:
        made[asked][0].send_signal(signal.SIGINT)
        made[asked][0].send_signal(signal.SIGINT)
        codes = [process.wait(60) for process, _, _ in made]
        texts = [err.read_text() for _, _, err in made]
    assert codes[asked] == 130 and codes[1 - asked] in (1, 143)
    assert all("Check failure" not in text and text.count("\n") <= 1 for text in texts)
