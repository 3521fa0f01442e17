"""A run keeps what it is: its classes and its patch grid, wherever its weights go."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken import data, train, workdirs
from dyntoken.tools import convert
from dyntoken.weights import runs
from dyntoken.workdirs import CheckpointError
from tests.train.tiny import tiny_config

NAMES = ("bird", "cat", "dog", "fish", "horse", "newt", "owl")
OBLONG = {"data__size": (8, 16), "model__patch_size": 4, "data__augment": {}}
real_info = data.info


def name_classes(patch, names):
    """Sets the class names of the data, and with them their number."""

    def info(*args, **options):
        found = real_info(*args, **options)
        return dataclasses.replace(
            found, class_names=tuple(names), num_classes=len(names) or found.num_classes
        )

    patch.setattr(data, "info", info)


@pytest.fixture
def classes(monkeypatch):
    return functools.partial(name_classes, monkeypatch)


def quiet(line):
    """No log."""


@pytest.fixture(scope="module")
def named_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("named") / "run"
    with pytest.MonkeyPatch.context() as patch:
        name_classes(patch, NAMES)
        train.run(tiny_config(steps=1), workdir, log=quiet)
    return workdir


@pytest.fixture
def trained(named_run, tmp_path, classes):
    """A copy of the run, to be changed; its classes are the data's."""
    classes(NAMES)
    return shutil.copytree(named_run, tmp_path / "run")


def test_a_checkpoint_names_its_classes_under_its_checksum(trained):
    meta = runs.of_workdir(trained)
    assert runs.class_names(meta) == list(NAMES)
    assert meta["run"]["image_shape"] == [16, 16, 3] and meta["run"]["model"]["num_classes"] == 7
    path = next((trained / "checkpoints").glob("*/meta/metadata"))
    path.write_text(path.read_text().replace("bird", "bard"))
    assert runs.of_workdir(trained) == {}


CHANGED = {
    "renamed": (("bird", "kitten", *NAMES[2:]), ["'cat'", "'kitten'"]),
    "permuted": (("cat", "bird", *NAMES[2:]), ["'bird'", "'cat'", "order"]),
    "added": ((*NAMES, "zebra"), ["'zebra'", "8"]),
    "removed": (NAMES[:-1], ["'owl'", "6"]),
}


@pytest.mark.parametrize("names, said", CHANGED.values(), ids=CHANGED)
def test_other_classes_are_an_error_on_every_way_on(trained, classes, names, said, tmp_path):
    classes(names)
    before = sorted(str(p) for p in trained.rglob("*"))
    ways = {
        "resume": lambda: train.run(tiny_config(steps=2), trained, log=quiet),
        "evaluation": lambda: train.evaluate(tiny_config(steps=1), trained, log=quiet),
        "go on elsewhere": lambda: train.run(
            tiny_config(steps=2, resume=str(trained)), tmp_path / "b", log=quiet
        ),
        "start from": lambda: train.run(
            tiny_config(steps=1, init__path=str(trained)), tmp_path / "c", log=quiet
        ),
    }
    for way, go in ways.items():
        with pytest.raises(CheckpointError) as error:
            go()
        assert all(word in str(error.value) for word in [str(trained), *said]), way
        assert "\n" not in str(error.value)
    assert before == sorted(str(p) for p in trained.rglob("*"))


def test_the_same_classes_go_on_also_where_the_data_name_none(trained, classes, tmp_path):
    config = tiny_config(steps=1)
    assert train.evaluate(config, trained, log=quiet)["count"] == 37
    classes([f" {name}" for name in NAMES])  # spelled with other spaces, as two sources of one set may
    assert train.evaluate(config, trained, log=quiet)["count"] == 37
    classes(())
    assert train.evaluate(config, trained, log=quiet)["count"] == 37


def test_a_fresh_classifier_may_have_other_classes(trained, classes, tmp_path):
    classes(CHANGED["added"][0])
    config = tiny_config(steps=1, init__path=str(trained), init__head="reset")
    assert train.run(config, tmp_path / "more", log=quiet).finished


def test_a_teacher_of_other_classes_is_refused(trained, classes, tmp_path):
    classes(CHANGED["permuted"][0])
    model = {f"teacher__{k}": v for k, v in tiny_config().model.to_dict().items()}
    config = tiny_config(steps=1, **model, teacher__weights=str(trained), losses__logit_kl={"weight": 1.0})
    with pytest.raises(CheckpointError, match="teacher"):
        train.run(config, tmp_path / "taught", log=quiet)


# The grid.


def turned(tree, name="pos_embed"):
    """The one position embedding `[1, prefix + n, C]` of variables."""
    (found,) = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if name in jax.tree_util.keystr(path)
    ]
    return np.asarray(found)


def model_of(size, **more):
    config = tiny_config(**OBLONG).model.to_dict()
    return dyntoken.create_model(config.pop("name"), num_classes=7, **{**config, "img_size": size, **more})


@pytest.fixture(scope="module")
def oblong_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("oblong") / "run"
    train.run(tiny_config(steps=1, **OBLONG), workdir, log=quiet)
    return workdir


@pytest.fixture
def oblong(oblong_run, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(oblong_run, tmp_path / "run")


def check_resized(source):
    """Weights of 2 x 4 patches in a model of 4 x 2: resized as if the source's grid had been given."""
    same = turned(dyntoken.load_weights(model_of((8, 16)), source))
    expected = turned(dyntoken.load_weights(model_of((16, 8)), source, source_grid=(2, 4)))
    found, report = dyntoken.load_weights(model_of((16, 8)), source, return_report=True)
    np.testing.assert_array_equal(turned(found), expected)
    assert report.resized and np.abs(turned(found) - same).max() > 1e-4
    _, report = dyntoken.load_weights(model_of((8, 16)), source, return_report=True)
    assert not report.resized


def test_an_oblong_run_loads_into_a_turned_model_resized(oblong):
    check_resized(oblong)
    check_resized(oblong / "checkpoints" / "1")


def test_a_run_from_before_its_model_was_kept_too(oblong):
    path = oblong / "checkpoints" / "1" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["run"], meta["checksum"]
    path.write_text(json.dumps({**meta, "checksum": workdirs.checksum(meta)}))
    check_resized(oblong)


@pytest.mark.parametrize("to", ["ours", "timm"])
def test_what_convert_writes_keeps_the_grid(oblong, tmp_path, to, capsys):
    target = str(tmp_path / "out.safetensors")
    shape = [
        "--img_size=8x16",
        "--set=patch_size=4",
        "--set=width=8",
        "--set=depth=1",
        "--set=heads=2",
        "--set=num_classes=7",
    ]
    assert convert.main([str(oblong), target, "--model=deit_tiny_patch4_16", f"--to={to}", *shape]) == 0
    check_resized(target)


def test_a_cascade_keeps_the_grid_of_each_exit(tmp_path):
    small = {"width": 8, "depth": 1, "heads": 2, "num_classes": 3}
    model = dyntoken.create_model("dvt_deit_tiny", img_size=(8, 16), exits=((1, 2), (2, 4)), **small)
    other = dyntoken.create_model("dvt_deit_tiny", img_size=(16, 8), exits=((2, 1), (4, 2)), **small)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 16, 3), np.float32))
    dyntoken.save_weights(tmp_path / "a.safetensors", variables, model=model)
    _, report = dyntoken.load_weights(other, tmp_path / "a.safetensors", return_report=True)
    assert len(report.resized) == 2
    _, report = dyntoken.load_weights(model, tmp_path / "a.safetensors", return_report=True)
    assert not report.resized


def test_a_turned_config_neither_resumes_nor_evaluates_the_run(oblong):
    config = tiny_config(steps=2, **{**OBLONG, "data__size": (16, 8)})
    for go in (train.run, train.evaluate):
        with pytest.raises(CheckpointError, match=r"2x4.*4x2") as error:
            go(config, oblong, log=quiet)
        assert "\n" not in str(error.value)


def test_a_teacher_and_a_start_of_another_grid_are_resized(oblong, tmp_path):
    lines = []
    config = tiny_config(steps=1, init__path=str(oblong), **{**OBLONG, "data__size": (16, 8)})
    train.run(config, tmp_path / "next", log=lines.append)
    assert any("resized" in line for line in lines)


# The average.


@pytest.mark.thorough
def test_load_weights_says_that_the_average_is_mostly_the_start(tmp_path, caplog):
    model = tiny_config().model.to_dict()
    model = dyntoken.create_model(model.pop("name"), num_classes=7, **model)
    train.run(tiny_config(steps=2, ema=0.9999, ema_warmup=False), tmp_path / "a", log=quiet)
    dyntoken.load_weights(model, tmp_path / "a")
    assert "prefer='params'" in caplog.text
    caplog.clear()
    dyntoken.load_weights(model, tmp_path / "a", prefer="params")
    train.run(tiny_config(steps=2, ema=0.9999), tmp_path / "b", log=quiet)
    dyntoken.load_weights(model, tmp_path / "b")
    assert not caplog.text
