"""The modules of docs/adding_a_backbone.md and docs/adding_data.md, run from outside the package."""

import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken import data, train
from dyntoken.registry import load_plugins
from dyntoken.tools import bench, flops
from dyntoken.train.settings import override
from tests.train.tiny import tiny_config

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
BACKBONES, DATA = (DOCS / f"adding_{what}.md" for what in ("a_backbone", "data"))
SMALL = {"width": 16, "depth": 2, "heads": 2, "patch_size": 4}


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """The first block of each guide as a module that can be imported, and forgotten in the end."""
    folder = tmp_path_factory.mktemp("plugins")
    for guide, name in ((BACKBONES, "my_backbones"), (DATA, "my_data")):
        (folder / f"{name}.py").write_text(re.search(r"```python\n(.*?)```", guide.read_text(), re.S)[1])
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for name in ("my_backbones", "my_data"):
        sys.modules.pop(name, None)


def test_the_commands_know_a_backbone(capsys):
    commands = re.findall(r"python -m dyntoken\.tools\.(\w+) (.*)\n", BACKBONES.read_text())
    assert {tool for tool, _ in commands} == {"flops", "bench"}
    small = [f"--set={key}={value}" for key, value in SMALL.items()]
    for tool, command in commands:
        words = [*command.split(), *small, "--at=1", "--img_size=16", "--json"]
        if tool == "bench":
            assert bench.main([*words, "--batch=2", "--pairs=1"]) == 0
            assert command.split()[0] in capsys.readouterr().out
            continue
        assert flops.main(words) == 0
        assert json.loads(capsys.readouterr().out)["tokens"][0] == 17  # 4 x 4 patches and the class token


@pytest.mark.thorough
def test_a_backbone_trains_and_has_two_forms(tmp_path):
    config = tiny_config(steps=2, plugins=("my_backbones",))
    config.model = {"name": "dtps_convstem_tiny", **SMALL, "at": (1,), "keep": 0.6}
    result = train.run(config, str(tmp_path / "run"))
    model = train.build(config).model
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    run = jax.jit(lambda model, v: model.apply(v, images).logits, static_argnums=0)
    forms = [run(model.clone(form=form), result.state.variables) for form in ("gather", "mask")]
    np.testing.assert_allclose(*forms, atol=2e-5)


def test_a_backbone_checks_its_own_fields():
    load_plugins("my_backbones")
    assert set(dyntoken.list_models("convstem*")) == {"convstem_tiny", "convstem_small"}
    with pytest.raises(ValueError, match="patch_size 8 must be a power of 2 that divides 20 x 20"):
        dyntoken.create_model("convstem_tiny", img_size=20, patch_size=8)


@pytest.fixture
def arrays(tmp_path):
    """Two splits of stripes whose place is the class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 9)):
        labels = rng.integers(0, 2, count)
        images = rng.integers(0, 99, (count, 16, 16, 3)).astype(np.uint8)
        images[labels == 1, :, 8:] += 99
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "images.npy", images)
        np.save(tmp_path / split / "labels.npy", labels)
    return tmp_path


def test_a_data_set_trains(arrays, tmp_path):
    (command,) = re.findall(r"python -m dyntoken\.main (.*)\n", DATA.read_text())
    changes = [tuple(word.removeprefix("--config.").split("=", 1)) for word in command.split()[2:]]
    config = tiny_config(steps=2)
    config.data.options = {}
    override(config, [(key, str(arrays) if value == "DIR" else value) for key, value in changes])
    options = {"class_names": ("cat", "dog")}
    result = train.run(config, str(tmp_path / "run"))
    assert result.metrics["count"] == 9
    assert data.info("arrays", str(arrays), **options).class_names == ("cat", "dog")


def test_batches_of_a_data_set_are_a_function_of_the_step(arrays):
    load_plugins("my_data")
    given = {
        "batch": 8,
        "seed": 3,
        "data_dir": str(arrays),
        "augment": {"crop": "pad", "pad": 2, "flip": 0.5},
    }
    batches = data.train_batches("arrays", **given)
    first = [next(batches) for _ in range(6)]
    again = next(data.train_batches("arrays", **given, start_step=5))
    halves = [next(data.train_batches("arrays", **given, start_step=5, process=(p, 2))) for p in (0, 1)]
    for key in ("image", "label"):
        np.testing.assert_array_equal(first[5][key], again[key])
        np.testing.assert_array_equal(np.concatenate([half[key] for half in halves]), again[key])


def test_data_that_are_not_there_are_asked_for(tmp_path):
    load_plugins("my_data")
    with pytest.raises(data.MissingDataError, match=r"no SPLIT/images.npy .* set config.data.data_dir"):
        data.info("arrays", str(tmp_path))
