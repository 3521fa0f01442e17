"""`dyntoken NAME ...`: one command for all programs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dyntoken import __main__ as program
from dyntoken import interrupt, main


def test_every_program_has_a_line(capsys):
    known = program.programs()
    assert {"train", "eval", "flops", "bench", "show", "predict", "export", "sweep", "convert"} <= {*known}
    assert "cli" not in known and "pictures" not in known and all(known.values())
    assert program.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told and line in told for name, line in known.items())
    assert max(map(len, told.splitlines())) <= 130


@pytest.mark.parametrize("name", [name for name in program.programs() if name not in program.OF_MAIN])
def test_help_has_two_examples(name, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main([name, "--help"])
    assert stop.value.code == 0
    _, _, examples = capsys.readouterr().out.partition("examples:")
    assert examples.count(f"python -m dyntoken.tools.{name} ") >= 2


def test_a_program_runs(capsys):
    assert program.main(["flops", "deit_tiny_patch16_224"]) == 0
    assert "1.2" in capsys.readouterr().out
    assert program.main(["flop"]) == 2
    assert "did you mean flops?" in capsys.readouterr().err
    assert program.main(["--version"]) == 0


def test_errors_begin_with_what_was_typed(capsys):
    assert program.main(["flops", "deit_smal_patch16_224"]) == 1
    assert capsys.readouterr().err.startswith("dyntoken flops: error: unknown model")
    with pytest.raises(SystemExit):
        program.main(["flops"])
    assert capsys.readouterr().err.startswith("dyntoken flops: error: the following")


def test_train_and_eval_are_the_main_program(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(main, "cli", lambda: seen.append(sys.argv[1:]))
    program.main(["train", "--config=x"])
    program.main(["eval", "--config=x", "--workdir=y"])
    assert seen == [["--config=x"], ["--config=x", "--workdir=y", "--mode=eval"]]


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (
            ["python", "-m", "dyntoken", "train", "--config=a b"],
            "; to go on: python -m dyntoken train '--config=a b'",
        ),
        (["python", "/usr/bin/dyntoken", "train", "--config=a"], "; to go on: dyntoken train --config=a"),
        (["python", "/usr/bin/dyntoken", "eval", "--config=a"], ""),
        (["python", "-m", "dyntoken", "flops", "x"], ""),
    ],
)
def test_how_to_go_on(words, again, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", words)
    assert interrupt.is_program() and interrupt.go_on() == again


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "dyntoken"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "programs:" in done.stdout and not done.stderr
