"""Ctrl-C and SIGTERM at any moment of a program: one line, exit code 128 + signal, nothing lost."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dyntoken import interrupt

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPE = """
from tests.train.tiny import tiny_config


def get_config(arg=None):
    return tiny_config(steps=100000, checkpoint_steps=50000, eval_steps=50000)
"""


class Program:
    """A program of the package in a process of its own, and what it has said."""

    def __init__(self, folder: pathlib.Path, *words: str):
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words], cwd=folder, env=env, stdout=out, stderr=err
            )

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 240
        while text not in self.out.read_text():
            assert self.process.poll() is None, self.err.read_text()
            if time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(self.out.read_text())
            time.sleep(0.02)

    def wait_for_handlers(self) -> None:
        """Until SIGTERM is caught: the first thing that the package does in a program."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status")
        while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
            assert self.process.poll() is None, self.err.read_text()
            time.sleep(0.01)

    def stop(self, *signums: int) -> tuple[int, list[str]]:
        """Sends signals; (exit code, lines on stderr)."""
        for signum in signums:
            self.process.send_signal(signum)
            time.sleep(0.3)
        try:
            code = self.process.wait(60)
        finally:
            self.process.kill()
        return code, self.err.read_text().splitlines()


def training(tmp_path, *more: str) -> Program:
    (tmp_path / "recipe.py").write_text(RECIPE)
    return Program(tmp_path, "dyntoken.main", "--config=recipe.py", "--workdir=run", *more)


@pytest.mark.thorough
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_while_training_it_saves_and_says_how_to_go_on(tmp_path, signum):
    program = training(tmp_path)
    program.wait_for("step 3/")
    code, errors = program.stop(signum)
    said = program.out.read_text().splitlines()[-1]
    assert (code, errors) == (128 + signum, [])
    assert "-m dyntoken.main --config=recipe.py --workdir=run" in said
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(last)]
    assert f"step {last}" in said


EVALUATING = """
import importlib, os, time
from tests.train.tiny import tiny_config

evaluate = importlib.import_module("dyntoken.train.evaluate")
placed = evaluate._placed


def slow(*args, **more):
    for number, batch in enumerate(placed(*args, **more)):
        print("batch", number, flush=True)
        time.sleep(float(os.environ.get("SLOW", 0)))
        yield batch


evaluate._placed = slow


def get_config(arg=None):
    return tiny_config(steps=6, eval_steps=2, keep_best=1, keep_checkpoints=1, best_metric="loss")
"""


@pytest.mark.thorough
def test_while_evaluating_it_saves_first_and_the_next_session_evaluates(tmp_path, monkeypatch):
    (tmp_path / "recipe.py").write_text(EVALUATING)

    def session(workdir: str) -> Program:
        return Program(tmp_path, "dyntoken.main", "--config=recipe.py", f"--workdir={workdir}")

    monkeypatch.setenv("SLOW", "2")
    program = session("run")
    program.wait_for("batch 0")
    assert program.stop(signal.SIGTERM) == (143, [])
    assert "batch 1" not in program.out.read_text()
    assert "stopped by a signal after step 2, which is saved" in program.out.read_text().splitlines()[-1]
    assert [(row["step"], row["kind"]) for row in rows(tmp_path / "run")] == [(1, "train"), (2, "train")]

    monkeypatch.setenv("SLOW", "0")
    for workdir in ("run", "straight"):
        assert session(workdir).process.wait(240) == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    kept = [
        sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir()) for name in ("run", "straight")
    ]
    assert kept[0] == kept[1]


def rows(workdir: pathlib.Path) -> list[dict]:
    """What was recorded, without what depends on the clock."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_s", "data_wait")} for row in found
    ]


@pytest.mark.thorough
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["import", "compile"])
def test_before_the_first_step_it_ends_at_once(tmp_path, moment, signum):
    program = training(tmp_path)
    program.wait_for("starting" if moment == "import" else "compiling")
    began = time.monotonic()
    code, errors = program.stop(signum)
    assert code == 128 + signum and len(errors) == 1 and time.monotonic() - began < 5
    assert "-m dyntoken.main --config=recipe.py --workdir=run" in errors[0]
    assert not list(tmp_path.glob("run/lock-*"))  # the next run need not find out whose that is


@pytest.mark.thorough
def test_the_second_one_ends_at_once(tmp_path):
    slow = "import time; from dyntoken.checkpoints import Checkpoints; "
    slow += "Checkpoints.save = lambda *args, **more: time.sleep(60)"
    (tmp_path / "slow.py").write_text(slow)
    (tmp_path / "recipe.py").write_text(f"exec(open({str(tmp_path / 'slow.py')!r}).read())\n{RECIPE}")
    program = Program(tmp_path, "dyntoken.main", "--config=recipe.py", "--workdir=run")
    program.wait_for("step 3/")
    began = time.monotonic()
    code, errors = program.stop(signal.SIGINT, signal.SIGINT)
    assert code == 130 and len(errors) == 1 and time.monotonic() - began < 10


@pytest.mark.thorough
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("delay", [0.0, 0.5, 1.5, 6.0])  # imports first, then compilation and the work itself
def test_a_tool_ends_in_one_line(tmp_path, delay):
    program = Program(tmp_path, "dyntoken.tools.bench", "dtps_deit_small_patch16_224", "--batch=64")
    program.wait_for_handlers()
    time.sleep(delay)
    code, errors = program.stop(signal.SIGINT)
    assert code == 130 and len(errors) == 1 and "interrupted" in errors[0]


def test_an_event_loop_does_not_swallow_a_signal(tmp_path):
    """Orbax runs one in the main thread, which has the signals' numbers sent to itself meanwhile."""
    (tmp_path / "program.py").write_text(
        "import os, signal, time; from dyntoken import interrupt; interrupt.install()\n"
        "mine = os.pipe()[1]; os.set_blocking(mine, False); signal.set_wakeup_fd(mine)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    program = Program(tmp_path, "program")
    program.wait_for("ready")
    assert program.stop(signal.SIGTERM) == (143, ["terminated"])


def test_of_several_processes_the_clusters_handler_stays():
    """It is set from C, where Python does not see it: to be replaced is to be lost."""
    before = [signal.getsignal(signum) for signum in interrupt.SIGNALS]
    stop = interrupt.Stop(several=True)
    with stop:
        during = [signal.getsignal(signum) for signum in interrupt.SIGNALS]
    assert during[1] == before[1] and during[0] != before[0]
    assert [signal.getsignal(signum) for signum in interrupt.SIGNALS] == before
    stop.signum = signal.SIGTERM
    stop.check()  # it is for all of them to stop, not for this one
    assert not stop.asked


NOTEBOOK = """
import os, signal, sys
from dyntoken import train
from tests.train.tiny import tiny_config

before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]

def log(line):
    if line.startswith("step 2/"):
        os.kill(os.getpid(), signal.SIGINT)

result = train.run(tiny_config(), sys.argv[1], log=log)
assert not result.finished and result.signum == signal.SIGINT and int(result.state.step) == 3
assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
assert train.run(tiny_config(), sys.argv[1], log=[].append).finished
"""


@pytest.mark.thorough
def test_a_notebook_keeps_its_handlers(tmp_path):
    """In a process of its own: others that the tests have loaded could take the signal."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "import signal; signal.signal(2, signal.default_int_handler)" + NOTEBOOK]
    done = subprocess.run(
        [*command, str(tmp_path / "run")], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
