"""The command line: what it prints when all is well, and one clear line when not."""

import contextlib
import importlib.metadata
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dyntoken import config as recipes
from dyntoken import main
from dyntoken.train import settings as train_settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPES = (
    *("deit", "dynamicvit_deit", "tps_deit", "evit_deit"),
    *("lvvit", "dynamicvit_lvvit", "tps_lvvit", "tps_psvit"),
    *("dynamicvit_swin", "dynamicvit_convnext", "tps_pvt", "tps_cvt"),
)
CASCADES = ("dvt_deit", "dvt_t2t", "dvt_cifar")


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
    assert "training" not in again.stdout and again.stdout.startswith("opening run, which holds a run: ")
    evaluated = _program("--config=configs/tps_deit.py:tiny", "--workdir=run", "--mode=eval", cwd=cwd)
    facts = json.loads(evaluated.stdout.strip().splitlines()[-1])
    assert {"top1", "count", "gmacs", "images_per_s"} <= set(facts)
    assert facts["count"] == 24 and 0 <= facts["top1"] <= 1
    alone = _program("--workdir=run", "--mode=eval", "--config.data.eval_split=test[:12]", cwd=cwd)
    assert json.loads(alone.stdout.strip().splitlines()[-1])["count"] == 12, alone.stderr


@pytest.mark.thorough
def test_an_evaluation_by_the_config_of_the_run(trained):
    """Exactly what the recipe's evaluation says; what does not fit is one line."""
    cwd, _ = trained
    both = [
        _program(*recipe, "--workdir=run", "--mode=eval", cwd=cwd)
        for recipe in (["--config=configs/tps_deit.py:tiny"], [])
    ]
    facts = [json.loads(done.stdout.strip().splitlines()[-1]) for done in both]
    assert facts[0]["loss"] == facts[1]["loss"] and facts[0]["top1"] == facts[1]["top1"]
    for args, message in (
        (["--workdir=run", "--config.model.name=dtps_deit_base_patch16_224"], "run is a run of dtps_"),
        (["--workdir=run", "--config.data.evalsplit=x"], "did you mean config.data.eval_split"),
        (["--workdir=absent"], "no run in absent (it has no config.json)"),
        ([], "which recipe? give --config=FILE[:args], or the --workdir of a run"),
    ):
        done = _program("--mode=eval", *args, cwd=cwd)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_absent_weights_are_named_in_one_line(tmp_path):
    done = _program("--config=configs/tps_deit.py", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith("error: weights/deit_small_patch16_224.safetensors")
    )
    assert "hf:ORG/NAME, or --config.init.path= (empty)" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--config=configs/tps_deit.py", "--config.optim.lrr=1"],
            "unknown option 'lrr' of config.optim: did you mean config.optim.lr",
        ),
        (
            ["--config=configs/tps_deit.py", "--config.optim.lr=fast"],
            "config.optim.lr is 'fast': give a number",
        ),
        (["--config=configs/tps.py"], "tps_deit.py"),
        (["--config=configs/tps_deit.py:sise=s"], "unknown config argument 'sise': did you mean size"),
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
            "dynamicvit, dtps.* work there",
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


def test_the_recipe_of_cifar10_builds():
    from dyntoken import train

    plan = train.build(recipes.load("configs/tps_deit.py:cifar10,keep=0.5"))
    assert plan.info.name == "cifar10" and plan.total_steps == 100 * (50_000 // 256)
    assert plan.model.at == (2, 3, 4) and plan.model.keep == 0.5
    assert set(plan.settings.losses) == {"ce", "keep_ratio"} and plan.teacher is None


@pytest.mark.thorough
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("argument", ["", ":demo", ":tiny"])
def test_every_recipe_builds(recipe, argument):
    from dyntoken import train

    plan = train.build(recipes.load(f"configs/{recipe}.py{argument}"))
    assert plan.total_steps > 0
    first = recipe.partition("_")[0]
    assert plan.model.method == {"dynamicvit": "dynamicvit", "tps": "dtps", "evit": "evit"}.get(first)


@pytest.mark.parametrize("argument", ["", "demo", "tiny", "exits=5-11,distill=1"])
def test_the_recipe_of_adaptive_depth_builds(argument):
    from dyntoken import train

    c = recipes.load(f"configs/multiexit_deit.py:{argument}")
    plan = train.build(c)
    assert plan.model.method == "multiexit" and set(c.losses) >= {"ce"}
    assert plan.model.exits == {"": (3, 7, 11), "demo": (1, 3, 5), "tiny": (0, 1, 3)}.get(argument, (5, 11))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "recipe", [*CASCADES, "dvt_deit:demo", "dvt_t2t:demo", "dvt_deit:exits=7-14", "dvt_t2t:depth=14"]
)
def test_every_recipe_of_a_cascade_builds(recipe):
    from dyntoken import train

    name, _, argument = recipe.partition(":")
    c = recipes.load(f"configs/{name}.py:{argument}")
    plan = train.build(c)
    assert plan.model.method == "dvt" and len(c.losses.ce.weights) == len(plan.model.exits) > 1
    if c.optim.get("cooldown_epochs"):
        rates = [plan.lr_fn(epoch * plan.steps_per_epoch) for epoch in (0, 20, 299, 300, 309)]
        assert rates[0] == pytest.approx(1e-6) and rates[1] < c.optim.lr and rates[3:] == [1e-5, 1e-5]
        assert 1e-5 < rates[2] < 1.01e-5 and plan.total_steps == 310 * plan.steps_per_epoch


DEIT, NOTHING = ("rand-m9-mstd0.5-inc1", 0.25), (None, 0.0)
VIEWS = {  # of an image in an epoch, where the official recipe augments as DeiT does
    **dict.fromkeys(("deit", "tps_deit", "evit_deit", "tps_lvvit", "tps_psvit"), 3),
    **dict.fromkeys(("dynamicvit_deit", "dynamicvit_lvvit", "lvvit", "dvt_deit", "dvt_t2t"), 1),
    **dict.fromkeys(("tps_pvt", "tps_cvt"), 3),
    **dict.fromkeys(("dynamicvit_swin", "dynamicvit_convnext"), 1),
    "multiexit_deit": 1,
}


@pytest.mark.parametrize("recipe", [*RECIPES, *CASCADES, "multiexit_deit"])
def test_what_is_augmented_how(recipe):
    """DeiT's augmentation on ImageNet alone; it needs TensorFlow, which toys and demos do not."""

    def section(argument):
        c = recipes.load(f"configs/{recipe}.py{argument}")
        augment = dict(c.data.augment)
        train_settings.read(c)
        return (augment.get("rand_augment"), c.mix.get("erase", 0.0)), augment.get("repeats", 1)

    assert section("") == ((DEIT, VIEWS[recipe]) if recipe in VIEWS else (NOTHING, 1))
    assert section(":tiny") == (NOTHING, 1)
    if recipe != "dvt_cifar":
        assert section(":demo") == (NOTHING, 1)


def test_the_biggest_lvvit_has_three_operations():
    assert recipes.load("configs/lvvit.py:size=l").data.augment.rand_augment == "rand-n3-m9-mstd0.5-inc1"


FIXED = {  # what the official scripts do not train
    "dvt_deit": (),
    "dvt_t2t": ("pos_embed", "/w"),
    "dvt_cifar": ("pos_embed", "/w", "cls_token", "backbone/norm/scale", "backbone/norm/bias"),
}


def _check_moves(recipe, result):
    """Every parameter has moved but those that the recipe fixes."""
    import jax
    import numpy as np

    from dyntoken import optim

    before = result.run.new_state().params
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), before, result.state.params)
    # Read by nothing after the last block of the last exit, where only decay moves it.
    unread = f"reuse_{len(result.model.exits) - 1}/context_1"
    for path, kept in optim.leaves(same):
        if not path.startswith(unread):
            assert kept == path.endswith(FIXED[recipe] or ("nothing",)), path


@pytest.mark.slow
@pytest.mark.parametrize("recipe", CASCADES)
def test_two_steps_of_a_cascade(recipe, tmp_path):
    from dyntoken import train

    result = train.run(recipes.load(f"configs/{recipe}.py:tiny"), tmp_path, log=[].append)
    assert len(result.metrics["top1_per_exit"]) == 3
    _check_moves(recipe, result)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """A tiny cascade of two exits, trained as the command line does, with the final table."""
    config = recipes.load("configs/dvt_deit.py:tiny,distill=0.5")
    config.model.exits, config.losses.ce.weights = (1, 2), (1.0, 1.0)
    config.compare = True
    workdir = tmp_path_factory.mktemp("cascade")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main.run(config, str(workdir), "train", False)
    return config, workdir, printed.getvalue().splitlines()


@pytest.mark.thorough
def test_a_cascade_reports_every_exit(cascade):
    _, workdir, lines = cascade
    row = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert row["ce"] == pytest.approx(sum(row["ce_per_exit"]), rel=1e-5)
    assert row["loss"] == pytest.approx(row["ce"] + 0.5 * sum(row["exit_kl_per_exit"]), rel=1e-5)
    assert len(row["ce_per_exit"]) == 2 and len(row["exit_kl_per_exit"]) == 1
    assert any(line.startswith("eval at step 2/2") and "top1_per_exit " in line for line in lines)


def test_a_cascade_ends_with_a_table_of_its_exits(cascade):
    _, workdir, lines = cascade
    table = lines[lines.index("fake, test split") + 1 :]
    assert table[0].split() == ["top-1", "%", "GMACs"]  # no dense model of these images ships
    names = ["linear classifier", "dvt_deit_small, exit 0", "dvt_deit_small, exit 1"]
    assert [line.split("  ")[0] for line in table[1:4]] == names
    rows = json.loads((workdir / "compare.json").read_text())
    assert [row.get("exit") for row in rows] == [None, 0, 1] and rows[1]["gmacs"] < rows[2]["gmacs"]
    assert (workdir / "exits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_eval_and_rerun_of_a_cascade(cascade, capsys):
    from dyntoken import train

    config, workdir, _ = cascade
    main.run(config, str(workdir), "eval", False)
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["top1"] == facts["top1_per_exit"][-1] and facts["count"] == 24
    assert len(facts["top1_per_exit"]) == len(facts["gmacs"]) == 2
    assert facts["gmacs"][0] < facts["gmacs"][1]
    assert {"ema/top1", "ema/top1_per_exit"} <= set(facts)
    result = train.run(config, workdir, log=[].append)  # nothing to do
    assert result.metrics["top1_per_exit"] == facts["top1_per_exit"]
    _check_moves("dvt_deit", result)


@pytest.mark.thorough
def test_dry_run_of_a_cascade_prints_every_exit(cascade, tmp_path, capsys):
    main.run(cascade[0], str(tmp_path), "train", True)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("gmacs: "))
    assert line.endswith(" up to each exit")
    costs = [
        float(word) for word in line.removeprefix("gmacs: ").removesuffix(" up to each exit").split(" / ")
    ]
    assert len(costs) == 2 and 0 < costs[0] < costs[1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", [*RECIPES, *CASCADES, "multiexit_deit"])
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
        ("dvt_t2t", False),
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
