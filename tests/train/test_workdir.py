"""A run opened from its folder alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken import train
from dyntoken.train.evaluate import open_workdir
from tests.train.tiny import tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("opened") / "run"
    return workdir, train.run(tiny_config(steps=2, ema=0.5), workdir, log=lambda line: None)


def test_variables_average_and_batches(trained):
    workdir, result = trained
    for ema, wanted in ((False, result.state.variables), (True, result.state.ema)):
        opened = open_workdir(workdir, ema=ema)
        assert opened.step == 2
        for found, expected in zip(jax.tree.leaves(opened.variables), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(found, expected)
    whole = np.concatenate([np.asarray(batch["mask"]) for batch in opened.batches()])
    assert whole.sum() == 37
    batch = next(opened.batches())
    assert batch["image"].sharding.mesh.size == opened.run.mesh.size == 4
    part = open_workdir(workdir, split="train[:5]")
    assert sum(float(batch["mask"].sum()) for batch in part.batches()) == 5


def test_a_class_by_its_number(trained):
    run = dyntoken.load_run(trained[0])
    assert [run.name(number) for number in (0, 6)] == ["class 0", "class 6"]
    for number in (7, 9, -1):
        with pytest.raises(ValueError, match=rf"no class {number}: the run has 7, 0 to 6"):
            run.name(number)


def test_one_clear_error_each(trained, tmp_path):
    workdir, _ = trained
    with pytest.raises(ValueError, match=r"no run in .*config.json.: give the workdir of a training run"):
        open_workdir(tmp_path)
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(ValueError, match="no checkpoints in"):
        open_workdir(tmp_path)
    with pytest.raises(ValueError, match="has no split 'tset'"):
        open_workdir(workdir, split="tset")


def test_another_model_in_the_same_workdir(trained):
    config = tiny_config(model__name="deit_small_patch8_24", data__size=24)
    with pytest.raises(ValueError, match=r"run of deit_tiny_patch8_16, .* model.name=deit_small_patch8_24"):
        train.evaluate(config, trained[0], log=lambda line: None)
