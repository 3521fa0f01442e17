"""One run at a time in a workdir; readers never write."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from etils import epath

import dyntoken
from dyntoken import train
from dyntoken.train import lock
from dyntoken.train.evaluate import open_workdir
from dyntoken.train.lock import Lock, LockedError
from tests.train.test_kill import kill_after, rows, start
from tests.train.tiny import long_config

ROOT = pathlib.Path(__file__).resolve().parents[2]


def process(*words) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "tests.faults.locker", *map(str, words)], cwd=ROOT)


def wait_until(reached, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def claims(workdir) -> list[str]:
    return sorted(path.name for path in pathlib.Path(workdir).iterdir() if path.name.startswith("lock-"))


def quiet(workdir) -> Lock:
    return Lock(epath.Path(workdir), log=lambda line: None)


@pytest.mark.thorough
def test_of_three_that_ask_at_once_one_holds_it(tmp_path):
    """Twenty times, in processes that see the starting sign within a millisecond of each other."""
    rounds = 20
    for number in range(rounds):
        (tmp_path / str(number)).mkdir()
    asking = [process(tmp_path, rounds) for _ in range(3)]
    try:
        for number in range(rounds):
            workdir = tmp_path / str(number)
            (workdir / "go").touch()
            wait_until(lambda workdir=workdir: len([p for p in workdir.glob("said-*") if p.read_text()]) == 3)
            said = {path.name: path.read_text() for path in workdir.glob("said-*")}
            held = [name.removeprefix("said-") for name, text in said.items() if text == "held"]
            assert len(held) == 1, said
            assert all(text == "held" or "is in use by process" in text for text in said.values())
            assert len(claims(workdir)) == 1 and f"-{held[0]}-" in claims(workdir)[0]
            (workdir / "end").touch()
        assert [one.wait(60) for one in asking] == [0, 0, 0]
        assert not any(claims(tmp_path / str(number)) for number in range(rounds))
    finally:
        for one in asking:
            one.kill()


def test_a_killed_owner_is_followed_at_once(tmp_path):
    workdir = tmp_path / "0"
    workdir.mkdir()
    (workdir / "go").touch()
    owner = process(tmp_path, 1)
    try:
        wait_until(lambda: any(path.read_text() for path in workdir.glob("said-*")))
        with pytest.raises(
            LockedError, match=rf"in use by process {owner.pid} on .*--workdir.*delete"
        ) as caught:
            quiet(workdir).__enter__()
        assert "\n" not in str(caught.value) and len(claims(workdir)) == 1
    finally:
        owner.send_signal(signal.SIGKILL)
    # Not waited for: also one whose parent does not look is dead.
    began = time.monotonic()
    wait_until(
        lambda: "Z" in pathlib.Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[0]
    )
    with quiet(workdir):
        assert time.monotonic() - began < 5
        assert len(claims(workdir)) == 1 and f"-{os.getpid()}-" in claims(workdir)[0]
    assert claims(workdir) == []
    owner.wait()


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    monkeypatch.setattr(lock, "STALE_S", 1.5)
    monkeypatch.setattr(lock, "SETTLE_S", 1.0)


def claim(workdir, name="lock-elsewhere-7-abc.json", **changes):
    """One as this process would make it, with changes."""
    now = time.time()
    mine = {**lock._here(), "id": "abc", "since": now - 60, "beat": now, "held": True}
    (workdir / name).write_text(json.dumps({**mine, **changes}))
    return workdir / name


class TestGone:
    def test_the_number_of_the_process_is_used_again(self, tmp_path):
        claim(tmp_path, started="12345")
        with quiet(tmp_path):
            assert len(claims(tmp_path)) == 1

    @pytest.mark.parametrize("age", [0.0, 1.0, 3600.0, -3600.0])
    def test_on_another_machine(self, tmp_path, fast, age):
        """It is watched, not believed: its clock may be wrong."""
        claim(tmp_path, host="elsewhere", machine=["elsewhere"], pid=7, beat=time.time() - age)
        began = time.monotonic()
        with quiet(tmp_path):
            assert 0.4 <= time.monotonic() - began < 5

    @pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"pid": 3}'])
    def test_what_a_power_cut_leaves(self, tmp_path, fast, text):
        (tmp_path / "lock-host-3-x.json").write_text(text)
        with quiet(tmp_path):
            assert len(claims(tmp_path)) == 1


class TestAlive:
    @pytest.mark.parametrize("skew", [0.0, -3600.0, 3600.0])
    def test_on_another_machine(self, tmp_path, fast, skew):
        """Whose clock is an hour off."""
        beating, end = time.time() + skew, threading.Event()

        def beat():
            while not end.wait(0.05):
                claim(
                    tmp_path, "draft", machine=["elsewhere"], pid=7, host="elsewhere", beat=time.time() + skew
                )
                (tmp_path / "draft").rename(tmp_path / "lock-elsewhere-7-abc.json")

        claim(tmp_path, machine=["elsewhere"], pid=7, host="elsewhere", beat=beating)
        thread = threading.Thread(target=beat)
        thread.start()
        try:
            with pytest.raises(LockedError, match="in use by process 7 on elsewhere"):
                quiet(tmp_path).__enter__()
        finally:
            end.set()
            thread.join()
        assert claims(tmp_path) == ["lock-elsewhere-7-abc.json"]

    def test_twice_in_one_process(self, tmp_path):
        with quiet(tmp_path), pytest.raises(LockedError, match=f"process {os.getpid()} "):
            quiet(tmp_path).__enter__()
        with quiet(tmp_path):
            pass

    def test_who_was_followed_writes_nothing_more(self, tmp_path, fast):
        first = quiet(tmp_path)
        with first:
            first.check()
            (tmp_path / claims(tmp_path)[0]).unlink()  # as the one who followed does
            wait_until(lambda: first._lost, 10)
            with pytest.raises(LockedError, match="taken away"):
                first.check()
            assert claims(tmp_path) == []


def snapshot(folder: pathlib.Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


STEPS = 250


def run_two(folder: pathlib.Path, delay: float) -> None:
    """A second run in the workdir of one that trains: refused; the first ends as if nothing was."""
    workdir = folder / "run"
    first = start(workdir, str(STEPS))
    try:
        wait_until(lambda: len(rows(workdir)) > 20 or first.poll() is not None)
        time.sleep(delay)
        with pytest.raises(LockedError, match=f"in use by process {first.pid} "):
            train.run(long_config(STEPS), workdir, log=lambda line: None)
        assert first.poll() is None, "the first was over: nothing was tried"
        assert first.wait(300) == 0, (folder / "output.txt").read_text()
    finally:
        first.kill()
    assert [row["step"] for row in rows(workdir)] == [*range(1, STEPS + 1), STEPS]
    assert claims(workdir) == []


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return train.run(long_config(STEPS), tmp_path_factory.mktemp("straight"), log=lambda line: None)


def assert_as_alone(workdir, straight):
    again = train.run(long_config(STEPS), workdir, log=lambda line: None)  # nothing to do
    jax.tree.map(np.testing.assert_array_equal, again.state, straight.state)
    assert again.metrics == straight.metrics


@pytest.mark.thorough
def test_the_second_of_two_runs_is_refused(tmp_path, straight):
    run_two(tmp_path, 0.0)
    assert_as_alone(tmp_path / "run", straight)


@pytest.mark.slow
def test_twenty_of_twenty(tmp_path, straight):
    draw = random.Random(0)
    for number in range(20):
        (tmp_path / str(number)).mkdir()
        run_two(tmp_path / str(number), draw.uniform(0, 0.3))
        assert_as_alone(tmp_path / str(number) / "run", straight)


@pytest.mark.thorough
def test_a_killed_run_is_resumed_without_waiting_and_readers_write_nothing(tmp_path, straight):
    workdir = tmp_path / "run"
    kill_after(start(workdir, str(STEPS)), workdir, 30, delay=0.0)
    assert len(claims(workdir)) == 1
    (workdir / "checkpoints" / "999.orbax-checkpoint-tmp-7").mkdir()  # half-written
    before = snapshot(workdir)
    train.evaluate(long_config(STEPS), workdir, log=lambda line: None)
    dyntoken.load_weights(straight.model, workdir)
    open_workdir(workdir, log=lambda line: None)
    assert snapshot(workdir) == before
    log = []
    train.run(long_config(STEPS), workdir, log=log.append)
    assert any("run that is gone" in line for line in log)
    assert_as_alone(workdir, straight)
