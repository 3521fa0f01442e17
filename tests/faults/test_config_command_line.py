"""The command line sets every key that the code reads, named by the recipe or not; help; recipes that do not run."""

import os
import pathlib
import subprocess
import sys
import typing

import ml_collections
import pytest

from dyntoken import config as recipes
from dyntoken import losses, main, schema
from dyntoken.tools import flops
from dyntoken.train import settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODELS = (
    *("dtps_deit_tiny_patch8_16", "evit_lvvit_t", "dvt_dtps_deit_tiny", "multiexit_deit_tiny"),
    *(
        "etps_t2t_vit_12",
        "dtps_psvit_ti_14",
        "dtps_pvt_tiny",
        "dtps_cvt_13",
        "dynamicvit_swin_tiny",
        "convnext_tiny",
    ),
)
# Text and value; a key is set to each that it takes.
SAMPLES = [
    *(("fake", "fake"), ("None", None), ("1", 1), ("4", 4), ("0.25", 0.25), ("1e-3", 0.001)),
    *(("True", True), ("false", False), ("bfloat16", "bfloat16"), ("7x14", (7, 14))),
    *(("3-6-9", (3, 6, 9)), ("0.25,0.5", (0.25, 0.5)), ("(2, 3, 4, 5)", (2, 3, 4, 5))),
]


def recipe(model=MODELS[0]):
    """Names only what it must."""
    return ml_collections.ConfigDict(
        {
            "model": {"name": model},
            "data": {"name": "fake"},
            "losses": {name: {} for name in losses.LOSSES},
            "batch": 16,
            "teacher": {"name": "deit_tiny_patch8_16"},
            "evals": {"v2": {"name": "fake"}},
        }
    )


def command_line(config, *words):
    """`config` after `--config.KEY=VALUE` words, and what is read of it."""
    changes, rest = main.split_changes(["program", *words])
    assert rest == ["program"]
    settings.override(config, changes)
    return settings.read(config)


def value_of(section, key):
    for name in key.split(".")[1:]:
        section = section[name] if isinstance(section, dict) else getattr(section, name)
    return section


def every_key():
    seen = set()
    for model in MODELS:
        for key, kind in schema.leaves(settings.Settings, recipe(model), "config"):
            # A name or a plugin says what there is, what is prepared how the files beside weights: no sample would do.
            if key not in seen and key.rpartition(".")[2] not in ("name", "plugins", "prepared"):
                seen.add(key)
                yield pytest.param(model, key, kind, id=key)


@pytest.mark.parametrize(("model", "key", "kind"), list(every_key()))
def test_every_key_can_be_set_on_a_recipe_that_does_not_name_it(model, key, kind):
    taken = 0
    kinds = (kind, *typing.get_args(kind))
    words = [
        word for one in kinds if typing.get_origin(one) is typing.Literal for word in typing.get_args(one)
    ]
    samples = [*((str(word), word) for word in words), *SAMPLES]
    if key.endswith("rand_augment"):  # read further
        samples = [("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1")]
    for text, value in samples:
        try:
            fits = schema.check(kind, value, key)
        except ValueError:
            continue
        found = value_of(command_line(recipe(model), f"--{key}={text}"), key)
        if not isinstance(value, str) and str not in (kind, *getattr(kind, "__args__", ())):
            assert found == fits and type(found) is type(fits), text
        elif isinstance(value, str):
            assert found == fits
        taken += 1
    assert taken, f"no sample for {key}: {schema.describe(kind)}"


def test_the_keys_of_every_section_are_there():
    """What the table above is made of: more than the fields of the dataclasses."""
    keys = {key for model in MODELS for key, _ in schema.leaves(settings.Settings, recipe(model), "config")}
    assert len(keys) > 180
    for key in (
        *(
            "model.remat",
            "model.at",
            "model.img_size",
            "model.dtype",
            "model.score",
            "model.exits",
            "model.window",
        ),
        *(
            "data.mean",
            "data.augment.color_jitter",
            "data.eval.crop_pct",
            "data.options.channels",
            "optim.frozen",
        ),
        *(
            "init.resize",
            "losses.keep_ratio.divisor",
            "losses.ce.weights",
            "teacher.depth",
            "evals.v2.eval.crop_pct",
        ),
        *("profile.start", "keep_schedule.levels", "mix.switch_prob", "evals.v2.options.test"),
    ):
        assert f"config.{key}" in keys


def test_no_key_takes_what_is_not_finite():
    for model in MODELS:
        for key, kind in schema.leaves(settings.Settings, recipe(model), "config"):
            for value in (float("nan"), float("inf"), object()):
                with pytest.raises(ValueError, match=key):
                    schema.check(kind, value, key)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--config.model.remat=True"], "model.remat", True),
        (["--config.model.remat=dots_saveable"], "model.remat", "dots_saveable"),
        (["--config.model.remat"], "model.remat", True),
        (["--config.model.scan", "True"], "model.scan", True),
        (["--config.model.dtype=bf16"], "model.dtype", "bfloat16"),
        (["--config.model.keep=137-96-67"], "model.keep", (137, 96, 67)),
        (["--config.model.keep=0.7,0.5,0.3"], "model.keep", (0.7, 0.5, 0.3)),
        (["--config.model.keep=(0.7, 0.5, 0.3)"], "model.keep", (0.7, 0.5, 0.3)),
        (["--config.model.at=3-6-9"], "model.at", (3, 6, 9)),
        (["--config.model.at", "3"], "model.at", (3,)),
        (["--config.data.size=224x320"], "data.size", (224, 320)),
        (["--config.data.size=None"], "data.size", None),
        (["--config.data.augment.scale=1e-3-1"], "data.augment.scale", (0.001, 1.0)),
        (["--config.data.mean=0.1,0.2,3e-1"], "data.mean", (0.1, 0.2, 0.3)),
        (["--config.data.split=train[:90%]+test"], "data.split", "train[:90%]+test"),
        (["--config.data.augment=None"], "data.augment", None),
        (["--config.losses={'ce': {'weight': 2}}"], "losses", {"ce": {"weight": 2.0}}),
        (["--config.losses.ce#again.weight=0.5"], "losses.ce#again.weight", 0.5),
        (["--config.evals.own.name=fake", "--config.evals.own.split=train"], "evals.own.split", "train"),
        (["--config.optim.clip=none"], "optim.clip", None),
        (["--config.optim.frozen=pos_embed$,cls_token"], "optim.frozen", ("pos_embed$", "cls_token")),
        (["--config.optim.lr=1e-4"], "optim.lr", 1e-4),
        (["--config.steps=1e3"], "steps", 1000),
        (["--config.data.augment.flip=1"], "data.augment.flip", 1.0),
        (["--config.curves=0"], "curves", False),
        (["--config.resume=2024-01-02"], "resume", "2024-01-02"),
        (["--config.steps=2", "--config.steps=3"], "steps", 3),
    ],
    ids=str,
)
def test_spellings(words, key, value):
    for config in (recipe(), recipes.load("configs/tps_deit.py:tiny")):
        found = value_of(command_line(config, *words), f"config.{key}")
        assert found == value and (type(found) is type(value) or key == "model.dtype")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--config.optim.lrr=1", "did you mean config.optim.lr?"),
        ("--config.lr=1", "did you mean config.optim.lr?"),
        ("--config.optm.lr=1", "did you mean config.optim?"),
        ("--config.losses.ec.weight=1", "config.losses.ec: unknown loss 'ec'"),
        ("--config.optim.lr=fast", "config.optim.lr is 'fast'"),
        ("--config.seed=-1", "config.seed is '-1'"),
        ("--config.steps=1e21", "config.steps is '1e21'"),
        ("--config.data=3", "config.data is '3'"),
        ("--config.batch.size=3", "config.batch is"),
        ("--config.model.at=(((", "config.model.at is '((('"),
        ("--config.model.at=3-x", "config.model.at is '3-x'"),
        ("--config.data.size=1x2x3", "config.data.size is '1x2x3'"),
        ("--config.model.name=dtsp_deit_tiny", "config.model: "),
    ],
)
def test_what_is_wrong_is_said_by_full_key(word, says):
    with pytest.raises(ValueError) as caught:
        command_line(recipe(), word)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_recipe_computes_follows_what_is_set():
    config = recipes.load("configs/tps_deit.py")
    before = config.optim.lr
    assert command_line(config, "--config.batch=2048").optim["lr"] == pytest.approx(2 * before)
    assert command_line(config, "--config.optim.lr=0.5", "--config.batch=512").optim["lr"] == 0.5
    config = recipes.load("configs/tps_deit.py")
    found = command_line(config, "--config.teacher.weights=teacher.npz")  # the start is not the teacher's
    assert found.init["path"] == "weights/deit_small_patch16_224.safetensors" != found.teacher["weights"]
    found = command_line(recipes.load("configs/tps_deit.py"), "--config.init.path=dense.npz")
    assert found.init["path"] == found.teacher["weights"] == "dense.npz"


@pytest.mark.parametrize("at", ["3-6-9", "3,6,9", "(3, 6, 9)", "[3,6,9]"])
def test_a_recipe_takes_every_spelling(at):
    c = recipes.load(f"configs/tps_deit.py:size=t,at={at},keep=0.5")
    assert c.model.at == (3, 6, 9) and c.model.keep == 0.5 and "tiny" in c.model.name
    c = recipes.load(f"configs/dvt_deit.py:exits={at},tiny")
    assert len(c.model.exits) == 3


def program(*args, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dyntoken.main", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    "words", [["--help"], ["--helpfull"], ["--config=configs/tps_deit.py:tiny", "--help"]]
)
def test_help(words, tmp_path):
    done = program(*words, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for word in ("--config", "--workdir", "--mode", "--config.KEY=VALUE", "configs/common.py", "settings.py"):
        assert word in done.stdout
    assert ("`keep=`" in done.stdout and "--config.optim.lr" in done.stdout) == (len(words) > 1)


RECIPES = {
    "syntax": ("def get_config(arg=None):\n    return {\n", "line 2"),
    "argument": ("def get_config(arg, more):\n    return {}\n", "more"),
    "name": ("import nothing_like_it\n\n\ndef get_config(arg=None):\n    return {}\n", "nothing_like_it"),
    "body": ("def get_config(arg=None):\n    return {}['x']\n", "line 2"),
    "empty": (
        "import ml_collections\n\n\ndef get_config(arg=None):\n    return ml_collections.ConfigDict()\n",
        "missing",
    ),
    "none": ("def get_config(arg=None):\n    pass\n", "None"),
    "list": ("def get_config(arg=None):\n    return [1]\n", "[1]"),
    "no_recipe": ("x = 1\n", "get_config"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_does_not_run_ends_in_one_line(name, tmp_path):
    text, says = RECIPES[name]
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError) as caught:
        settings.read(recipes.load(str(tmp_path / "mine.py")))
    message = str(caught.value)
    assert says in message and "\n" not in message
    assert "mine.py" in message or name == "empty"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config=configs/tps_deit.py", "--btach=3"], "--config.batch"),
        (["--config=configs/tps_deit.py", "--lr=3"], "--config.optim.lr"),
        (["--config=configs/tps_deit.py", "--workdri=x"], "--workdir"),
        (["--config=configs/tps_deit.py:sise=t"], "did you mean size"),
        (["--config=configs/tps_deit.py:dmeo"], "did you mean demo"),
        (["--config=configs/tps_deit.py", "--config.model.patch_size=0"], "config.model.patch_size is '0'"),
        (["--config="], "tps_deit.py"),
    ],
)
def test_the_program_says_it_in_one_line(words, says, tmp_path):
    done = program(*words, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr


@pytest.mark.slow
def test_the_commands_of_the_readme(tmp_path):
    words = ("--config.model.remat=True", "--config.model.dtype=bfloat16", "--config.model.scan=True")
    done = program("--config=configs/tps_deit.py:tiny", *words, "--dry_run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plan: 2 steps of 16 images" in done.stdout


def test_a_tool_takes_every_spelling(capsys):
    tables = set()
    for words in (["--at=3-6-9", "--keep=0.7-0.5-0.3"], ["--at=(3, 6, 9)", "--set", "keep=0.7,0.5,0.3"]):
        assert flops.main(["dtps_deit_tiny", *words, "--json"]) == 0
        tables.add(capsys.readouterr().out)
    assert len(tables) == 1
