"""Options and error lines that the programs share."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys

import pytest

from dyntoken.tools import cli

NAMES = (
    *("bench", "bench_exits", "bench_input", "convert", "export", "features", "flops", "predict"),
    *("show", "show_augmentation", "show_exits", "thresholds", "tpu"),
)
PROGRAMS = {name: importlib.import_module(f"dyntoken.tools.{name}") for name in NAMES}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            ("0.7", 0.7),
            ("0.7,0.5,0.3", (0.7, 0.5, 0.3)),
            ("137,96,67", (137, 96, 67)),
            ("12", 12),
            ("1.0", 1.0),
        ),
        *(
            ("137-96-67", (137, 96, 67)),
            ("(0.7, 0.5)", (0.7, 0.5)),
            ("0.7-1e-1", (0.7, 0.1)),
            ("[12]", (12,)),
        ),
    ],
)
def test_keep_reads_rates_and_counts(text, value):
    got = cli.keep(text)
    assert got == value
    assert [type(v) for v in (got if isinstance(got, tuple) else (got,))] == [
        type(v) for v in (value if isinstance(value, tuple) else (value,))
    ]


def test_other_options():
    assert cli.ints("3,6,9") == cli.ints("3-6-9") == cli.ints("(3, 6, 9)") == (3, 6, 9) and cli.ints("3") == (
        3,
    )
    assert cli.floats("-1,0.5") == (-1.0, 0.5)
    assert (cli.size("224"), cli.size("224x320"), cli.size("224,320")) == (224, (224, 320), (224, 320))
    assert cli.assignment("num_classes=10") == ("num_classes", "10")  # text: the keyword's type reads it
    assert cli.assignment("pool=") == ("pool", "")


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (cli.keep, "much"),
        (cli.keep, "0.7,,0.3"),
        (cli.ints, "3;6"),
        (cli.size, "0"),
        (cli.size, "1x2x3"),
        (cli.assignment, "form"),
        (cli.positive, "0"),
    ],
)
def test_nonsense_is_named(read, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r".+"):
        read(text)


def test_units():
    assert [cli.short(n) for n in (7, 1234, 57802752, 2991620544)] == ["7", "1.23 k", "57.80 M", "2.992 G"]


def test_tables_line_up():
    assert cli.table([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_has_examples(name, capsys):
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[name].main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.startswith(f"usage: python -m dyntoken.tools.{name}")
    assert f"  python -m dyntoken.tools.{name} " in text.partition("examples:")[2]


def test_help_does_not_wait_for_jax():
    """Nor do mistyped options, which are read the same way."""
    programs = ", ".join(name for name in NAMES if name not in ("show_exits", "thresholds"))
    code = (
        f"import sys\nfrom dyntoken.tools import {programs}\n"
        f"for program in ({programs}):\n"
        "    for words in (['--help'], ['--no_such_option']):\n"
        "        try: program.main(words)\n"
        "        except SystemExit: pass\n"
        "assert 'jax' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "words", "program"),
    [
        ("bench", ["--input", "configs/tps_deit.py"], "bench_input"),
        ("bench", ["dvt_deit_small", "--exits=80,15,5"], "bench_exits"),
        ("show", ["--exits", "--workdir=runs/dvt_demo"], "show_exits"),
        ("show", ["--augment=configs/tps_deit.py"], "show_augmentation"),
    ],
)
def test_the_old_spelling_of_a_program_names_the_new_one(name, words, program, capsys):
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[name].main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"python -m dyntoken.tools.{program} " in error
    assert importlib.util.find_spec(f"dyntoken.tools.{program}")


BAD = [
    ("flops", ["dtsp_deit_small_patch16_224"], "unknown method 'dtsp': did you mean dtps"),
    ("flops", ["deit_smal_patch16_224"], "deit_small_patch16_224"),
    ("flops", ["deit_tiny_patch16_224", "--keep=0.7"], "is dense and takes no 'keep'"),
    ("flops", ["dtps_deit_tiny_patch16_224", "--at=3,99"], "increasing block indices between 0 and 11"),
    ("flops", ["dtps_deit_tiny_patch16_224", "--keep=0.5,0.5"], "2 entries for 3 sites"),
    ("flops", ["dtps_deit_tiny_patch16_224", "--img_size=225"], "not divisible by patch_size"),
    ("flops", ["dtps_deit_tiny_patch16_224", "--fuse=squeze"], "did you mean squeeze?"),
    ("flops", ["dtps_deit_tiny_patch16_224", "--set", "depht=3"], "did you mean depth"),
    ("bench", ["vit_mini_patch4_28"], "name a second model with --vs"),
    ("show", ["vit_mini_patch4_28", "--weights=w.npz", "fashion_mnist_mini:0"], "keeps every token"),
    ("show", ["dtps_vit_mini_patch4_28", "--weights=w.npz", "none.png"], "none.png: no such picture"),
    ("show", ["dtps_vit_mini_patch4_28", "--weights=w.npz", "fashion_mnist_mini:2000"], "images 0 to 1999"),
    ("show", ["dtps_deit_tiny_patch16_224", "--weights=w.npz", "fashion_mnist_mini:0"], "--set in_chans=1"),
    ("show", ["dtps_vit_mini_patch4_28", "--weights=w.npz", "fashion_mnist_mini:0"], "w.npz: no such weight"),
    ("convert", ["a.npz", "b.npz", "--model=vit_mini_patch4_28"], "--to=ours writes .safetensors"),
    ("convert", ["a.npz", "b.safetensors", "--model=vit_mini_patch4_28"], "a.npz: no such weight"),
]


@pytest.mark.parametrize(("name", "argv", "message"), BAD)
def test_bad_input_is_one_line_and_status_1(name, argv, message, capsys):
    assert PROGRAMS[name].main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"python -m dyntoken.tools.{name}: error: ")
    assert message in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("flops", [], "the following arguments are required: NAME"),
        ("flops", ["deit_tiny_patch16_224", "--keep=x"], "argument --keep: 'x': give a number"),
        ("flops", ["deit_tiny_patch16_224", "--kep=1"], "unrecognized arguments: --kep=1"),
        ("bench", ["dtps_deit_tiny_patch16_224", "--batch=0"], "'0': give a whole number of at least 1"),
        ("show", ["dtps_vit_mini_patch4_28", "x.png"], "give --weights"),
        ("convert", ["a"], "required: OUT"),
    ],
)
def test_bad_options_are_one_line_and_status_2(name, argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[name].main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"python -m dyntoken.tools.{name}: error: ")
    assert message in error and error.count("\n") == 1


def test_the_command_itself(tmp_path):
    command = [sys.executable, "-m", "dyntoken.tools.flops", "dtps_deit_tiny_patch16_224", "--keep=2.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(
        "python -m dyntoken.tools.flops: error: keep rate 2.0 of site 0 is not in (0, 1]"
    )
    assert "Traceback" not in done.stderr
