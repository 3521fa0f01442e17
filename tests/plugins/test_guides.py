"""The module of docs/adding_a_backbone.md, run from outside the package."""

import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken import train
from dyntoken.registry import load_plugins
from dyntoken.tools import bench, flops
from tests.train.tiny import tiny_config

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
BACKBONES = DOCS / "adding_a_backbone.md"
SMALL = {"width": 16, "depth": 2, "heads": 2, "patch_size": 4}


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """The first block of each guide as a module that can be imported, and forgotten in the end."""
    folder = tmp_path_factory.mktemp("plugins")
    for guide, name in ((BACKBONES, "my_backbones"),):
        (folder / f"{name}.py").write_text(re.search(r"```python\n(.*?)```", guide.read_text(), re.S)[1])
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for name in ("my_backbones",):
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
