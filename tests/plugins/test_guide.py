"""The module of docs/adding_a_method.md, taken from there and run from outside the package."""

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

GUIDE = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "adding_a_method.md").read_text()
SMALL = {"width": 8, "depth": 2, "heads": 2, "patch_size": 4}
ARGUMENTS = [f"--set={key}={value}" for key, value in SMALL.items()]


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", GUIDE, re.S)[1]
    (tmp_path / "my_methods.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_methods"


@pytest.fixture(scope="module", autouse=True)
def forget():
    yield
    sys.modules.pop("my_methods", None)


def test_the_commands_know_its_names(module, capsys):
    commands = re.findall(r"python -m dyntoken\.tools\.(\w+) (.*)\n", GUIDE)
    assert {tool for tool, _ in commands} == {"flops", "bench"}
    for tool, command in commands:
        words = [*command.split(), *ARGUMENTS, "--at=1", "--img_size=16", "--json"]
        if tool == "bench":
            assert bench.main([*words, "--set=stem_width=4", "--batch=2", "--pairs=1"]) == 0
            assert command.split()[0] in capsys.readouterr().out
            continue
        assert flops.main(words) == 0
        assert len(json.loads(capsys.readouterr().out)["tokens"]) == 2


def _check_forms(model, variables):
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    run = jax.jit(lambda model, v: model.apply(v, images).logits, static_argnums=0)
    gathered, masked = (run(model.clone(form=form), variables) for form in ("gather", "mask"))
    np.testing.assert_allclose(gathered, masked, atol=2e-5)


@pytest.mark.thorough
def test_it_trains(module, tmp_path):
    config = tiny_config(steps=2, plugins=(module,))
    config.model = {"name": "twolayers_deit_tiny_patch16_224", **SMALL, "at": (1,), "keep": 0.6}
    result = train.run(config, str(tmp_path / "run"))
    _check_forms(train.build(config).model, result.state.variables)
    assert dyntoken.list_models("twolayers_deit_small_patch16_224")


def test_both_forms_of_a_scorer_on_keys(module):
    load_plugins(module)
    model = dyntoken.create_model("keynorm_deit_tiny_patch16_224", img_size=16, **SMALL, at=(1,), keep=0.6)
    _check_forms(model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3))))
