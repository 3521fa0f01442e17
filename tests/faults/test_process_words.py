"""What is said, and what is refused, before and instead of a figure."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

import dyntoken
from dyntoken.tools import convert, show
from dyntoken.weights import load_whole
from tests.train.tiny import DENSE, SMALL

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO = "--config=configs/tps_deit.py:demo"


def main(*words, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("TF_CPP_MIN_LOG_LEVEL", None)  # the tests' own
    command = [sys.executable, "-m", "dyntoken.main", *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--workdir=runs/mistyped"], "runs/mistyped"),
        ([], "runs/tps_deit_demo"),
        (["--workdir=runs/x", "--config.init.path=pretrained:vit_mini_patch4_28"], "runs/x"),
        (["--config.init.path=pretrained:vit_mini_patch4_28"], "predictor"),
    ],
)
def test_no_figure_without_a_run_or_whole_weights(tmp_path, words, named):
    done = main(DEMO, "--mode=eval", *words, cwd=tmp_path)
    assert done.returncode == 1 and "top1" not in done.stdout
    assert done.stderr.count("\n") == 1 and named in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_whole_weights_are_evaluated(tmp_path):
    words = "--config=configs/deit.py:demo", "--config.data.options.test=64", "--mode=eval"
    done = main(*words[::2], "--config.init.path=pretrained:vit_mini_patch4_28", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["top1"] > 0.9


def test_what_is_done_is_said_at_once(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dyntoken.main", "--config=configs/tps_deit.py:tiny", "--workdir=run"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as process:
        began = time.monotonic()
        line = process.stdout.readline()
        took = time.monotonic() - began
        process.kill()
    assert took < 5  # jax alone takes three seconds to import on a busy machine
    for word in ("dtps_deit_small_patch16_224", "fake", "2 steps", "16", "run"):
        assert word in line


def test_expected_parameters_are_not_called_missing():
    paths = ("backbone/trunk/reducer_0/predictor/in_conv_0/bias", "reuse_1/context_0/kernel", "head/cls/bias")
    text = str(dyntoken.weights.Report((), paths, (), (), origin="x")).splitlines()
    assert "fresh" in text[1] and paths[0] in text[1] and "missing" not in text[1]
    assert "fresh" in text[2] and paths[1] in text[2] and "missing" not in text[2]
    assert "1 missing: head/cls/bias" in text[3]
    text = str(dyntoken.weights.Report((), paths, (), (), origin="x", reset=paths[2:])).splitlines()
    assert len(text) == 4 and "fresh on purpose (head=reset): head/cls/bias" in text[3]


def test_an_absent_file_is_not_sent_to_the_command_that_was_run(tmp_path, capsys):
    for source in ("nope.pth", "nope.safetensors", "runs/nope"):
        assert (
            convert.main([source, str(tmp_path / "x.npz"), "--model=deit_tiny_patch16_224", "--to=timm"]) == 1
        )
        said = capsys.readouterr().err
        assert source in said and "tools.convert IN" not in said and said.count("\n") == 1


def test_no_picture_of_a_fresh_predictor(tmp_path, capsys):
    words = ["dtps_vit_mini_patch4_28", "--weights=pretrained:vit_mini_patch4_28", "fashion_mnist_mini:7"]
    assert show.main([*words, f"--out={tmp_path / 'out'}"]) == 1
    assert "predictor" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_whole_weights_may_be_resized_with_a_word(caplog):
    small, large = (dyntoken.create_model(DENSE, **SMALL, img_size=size) for size in (16, 32))
    variables = jax.jit(lambda: small.init(jax.random.key(0), jax.numpy.zeros((1, 16, 16, 3))))()
    with caplog.at_level(logging.WARNING, "dyntoken.weights"):
        _, report = load_whole(large, variables)
    assert report.resized and "resized" in caplog.text


def test_logs_of_c_plus_plus_stay_out_of_the_way(tmp_path):
    """Its alarm about slow compilation, a banner of stars, is an error to its logger."""
    (tmp_path / "recipe.py").write_text(
        "import os, sys\n\n\ndef get_config(arg=None):\n"
        "    raise ValueError('level ' + os.environ['TF_CPP_MIN_LOG_LEVEL'] + str('jax' in sys.modules))\n"
    )
    done = main("--config=recipe.py", cwd=tmp_path)
    assert done.returncode == 1 and "level 3False" in done.stderr
