"""Every demo, run to its end by the real program on the embedded images.

python -m pytest -m demo        # the two that CI runs
python -m pytest -m slow tests/test_demos.py
"""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dyntoken import config as recipes

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _has_demo(recipe):
    try:
        recipes.load(f"configs/{recipe}.py:demo")
    except ValueError:
        return False
    return True


FILES = recipes.locate("configs/common.py").parent.glob("*.py")
NO_RECIPES = ("__init__", "common", "toys")
DEMOS = sorted(path.stem for path in FILES if path.stem not in NO_RECIPES and _has_demo(path.stem))
IN_CI = ("tps_deit", "tps_lvvit")


def _program(*arguments, cwd):
    """`python -m dyntoken.main` as a user starts it: without the flags that make tests compile fast."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    env["JAX_PLATFORMS"] = "cpu"
    if not list(importlib.metadata.distributions(name="dyntoken")):
        env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "dyntoken.main", *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=pytest.mark.demo if name in IN_CI else pytest.mark.slow) for name in DEMOS],
)
def test_a_demo_learns(recipe, tmp_path):
    """Three of four images of the test split are right, by the command line's own evaluation."""
    config = f"--config=configs/{recipe}.py:demo"
    _program(config, "--workdir=run", cwd=tmp_path)
    told = _program(config, "--workdir=run", "--mode=eval", cwd=tmp_path)
    metrics = json.loads(told.splitlines()[-1])
    assert metrics["top1"] > 0.75 and metrics["count"] == 2000 and metrics["step"] > 0


@pytest.mark.parametrize("recipe", DEMOS)
def test_a_demo_evaluates_the_images_it_trains_on(recipe):
    """Stored images of another size are resized whole to train on: a centre crop would show larger things."""
    c = recipes.load(f"configs/{recipe}.py:demo")
    assert c.data.size == 28 or c.data.eval.crop_pct == 1.0


def test_there_are_demos():
    assert set(IN_CI) < set(DEMOS) and len(DEMOS) >= 10
