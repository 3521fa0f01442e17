"""The command line: what it prints when all is well, and one clear line when not."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dyntoken import config as recipes
from dyntoken import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPES = (
    *("deit", "dynamicvit_deit", "tps_deit", "evit_deit"),
    *("lvvit", "dynamicvit_lvvit", "tps_lvvit", "tps_psvit"),
)


def _program(*args, cwd):
    """Runs the installed program; the one of this tree where none is installed."""
    env = dict(os.environ)
    if not list(importlib.metadata.distributions(name="dyntoken")):
        env["PYTHONPATH"] = str(ROOT)
    run = [sys.executable, "-m", "dyntoken.main", *args]
    return subprocess.run(run, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One tiny run by the real program, from a folder that is not the repository."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    done = _program("--config=configs/tps_deit.py:tiny", "--workdir=run", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd, done


def test_train_then_rerun_then_eval(trained):
    cwd, done = trained
    assert "step 2/2" in done.stdout and "eval at step 2/2" in done.stdout
    again = _program("--config=configs/tps_deit.py:tiny", "--workdir=run", cwd=cwd)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    evaluated = _program("--config=configs/tps_deit.py:tiny", "--workdir=run", "--mode=eval", cwd=cwd)
    facts = json.loads(evaluated.stdout.strip().splitlines()[-1])
    assert {"top1", "count", "gmacs", "images_per_s"} <= set(facts)
    assert facts["count"] == 24 and 0 <= facts["top1"] <= 1


def test_absent_weights_are_named_in_one_line(tmp_path):
    done = _program("--config=configs/tps_deit.py", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith("error: weights/deit_small_patch16_224.safetensors")
    )
    assert "dyntoken.tools.convert" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=configs/tps_deit.py", "--config.optim.lrr=1"], 'Did you mean "lr"'),
        (["--config=configs/tps_deit.py", "--config.optim.lr=fast"], "could not convert string to float"),
        (["--config=configs/tps.py"], "tps_deit.py"),
        (["--config=configs/tps_deit.py:sise=s"], "this recipe takes variant, size"),
        ([], "which recipe?"),
    ],
)
def test_bad_flags_end_in_one_line(args, message, tmp_path):
    done = _program(*args, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and message in done.stderr


def _tiny(recipe="tps_deit", **changes):
    c = recipes.load(f"configs/{recipe}.py:tiny")
    with c.unlocked():
        for path, value in changes.items():
            section, _, key = path.rpartition("__")
            target = c[section] if section else c
            target[key] = value
    return c


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__name": "dpts_deit_small_patch16_224"}, "unknown method 'dpts'.*dtps"),
        (
            {"model__class_token": False, "model__name": "evit_deit_small_patch16_224"},
            "dynamicvit and dtps work",
        ),
        ({"batch": 18, "data__shards": 2}, "18.*4"),
        (
            {"data__name": "imagenet2012", "data__options": {}, "data__eval_split": "validation"},
            "imagenet2012",
        ),
        ({"data__name": "oxford_pets", "data__options": {}}, "oxford_pets"),
        ({"optimm": {}}, "optimm.*optim"),
        ({"losses": {"ce": {"wieght": 1}}}, "wieght.*weight"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(changes, message, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(main.USER_ERRORS, match=message):
        main.run(_tiny(**changes), str(workdir), "train", False)
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("argument", ["", ":demo", ":tiny"])
def test_every_recipe_builds(recipe, argument):
    from dyntoken import train

    plan = train.build(recipes.load(f"configs/{recipe}.py{argument}"))
    assert plan.total_steps > 0
    first = recipe.partition("_")[0]
    assert plan.model.method == {"dynamicvit": "dynamicvit", "tps": "dtps", "evit": "evit"}.get(first)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_header_command_parses_and_says_what_was_not_run(recipe):
    file = recipes.locate(f"configs/{recipe}.py")
    header = file.read_text().split('"""')[1]
    commands = [line.split("--config=")[1].split()[0] for line in header.splitlines() if "--config=" in line]
    assert len(commands) >= 3 and "not yet run" in " ".join(header.split())
    for command in commands:
        recipes.load(command)


def test_learning_rates_scale_with_the_batch_where_the_papers_do():
    for recipe, scales in (
        ("tps_deit", True),
        ("evit_deit", True),
        ("deit", True),
        ("dynamicvit_deit", False),
    ):
        c = recipes.load(f"configs/{recipe}.py")
        before, c.batch = c.optim.lr, c.batch * 2
        assert c.optim.lr == pytest.approx(before * (2 if scales else 1)), recipe


def test_recipe_arguments():
    c = recipes.load("configs/tps_deit.py:variant=etps,size=t,keep=0.5,at=2-4-6-8")
    assert c.model.name == "etps_deit_tiny_patch16_224" and c.model.at == (2, 4, 6, 8) and c.model.keep == 0.5
    assert set(c.losses) == {"ce"} and not c.teacher.name  # the tiny recipe has no distillation
    c = recipes.load("configs/dynamicvit_deit.py:keep=137-96-67")
    assert c.model.keep == (137, 96, 67) and c.teacher.name == "deit_small_patch16_224"
    c.init.path = "other.safetensors"
    assert c.teacher.weights == "other.safetensors"  # the teacher follows the start
