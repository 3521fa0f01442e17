"""Live lines on a terminal, and silence without one."""

from __future__ import annotations

import io
import sys
import time

from dyntoken import progress
from dyntoken.train.logging import Progress


def on_terminal(monkeypatch):
    """Makes stderr one that says it is a terminal; returns what tells its text so far."""
    made = io.StringIO()
    made.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", made)  # within the test: pytest sets it anew after the fixtures
    monkeypatch.setattr(progress, "TICK_S", 0.02)
    return made.getvalue


def test_without_a_terminal_nothing_is_written(capsys):
    assert [*progress.over("abc", "reading", 3)] == ["a", "b", "c"]
    with progress.waiting("compiling"):
        time.sleep(0.05)
    progress.beside(print)("a line")
    assert tuple(capsys.readouterr()) == ("a line\n", "")


def test_a_bar_has_an_eta_and_leaves_no_line(capfd, monkeypatch):
    terminal = on_terminal(monkeypatch)
    items = progress.over(range(3), "evaluating", 3, unit="batches")
    next(items)
    time.sleep(0.15)  # tqdm writes ten times a second
    next(items)
    told = terminal()
    assert "evaluating" in told and "1/3 batches" in told and "ETA 00:0" in told
    progress.beside(print)("a line")  # clears the bar, and draws it again below
    assert capfd.readouterr().out == "a line\n" and terminal().count("evaluating") > told.count("evaluating")
    items.close()
    told = terminal()
    assert "\n" not in told and told.endswith("\r") and "\x1b[3" not in told  # no colour


def test_a_pace_is_told_per_second_or_per_item(monkeypatch):
    assert progress.speed(4.216, "steps") == "4.22 steps/s" and progress.speed(130.0, "rows") == "130 rows/s"
    assert progress.speed(1 / 24.53, "steps") == "24.5 s/step"
    assert progress.speed(0.5, "batches") == "2.0 s/batch"
    terminal = on_terminal(monkeypatch)
    line = progress.bar("training", 10, unit="steps", start=4)
    line.set_postfix_str("loss 2")
    told = terminal()
    line.close()
    assert "4/10 steps, loss 2" in told and "?" not in told and "ETA" not in told


def test_seconds_of_what_tells_nothing(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with progress.waiting("compiling"):
        time.sleep(0.1)
    told = terminal()
    assert "compiling ... 0 s" in told and told.endswith("\r\x1b[K")


def test_training_counts_from_where_it_goes_on(monkeypatch):
    terminal = on_terminal(monkeypatch)

    class Metrics:
        row = None

    metrics = Metrics()
    line = Progress(10, metrics)
    line.start(4)
    time.sleep(0.15)
    metrics.row = {"loss": 1.25}
    line.step(5, {})
    line.start(8)  # after a rewind or another compilation
    line.close()
    told = terminal()
    assert "4/10 steps" in told and "8/10 steps" in told
