"""Words of errors that lead on: what is named can be done, and what is proposed is accepted next."""

import re

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken import train
from dyntoken.data import DataError
from dyntoken.train import sharding as mesh
from dyntoken.weights import WeightsError
from tests.train.tiny import DTPS, SMALL, tiny_config


def _saved(path, depth):
    model = dyntoken.create_model("deit_tiny_patch8_16", width=8, heads=2, depth=depth, num_classes=7)
    dyntoken.save_weights(path, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32)))
    return path


@pytest.mark.parametrize("depth", [2, 3])
def test_weights_of_fewer_blocks_are_refused_though_most_arrays_fit(tmp_path, depth):
    path = _saved(tmp_path / "shallow.safetensors", depth)
    model = dyntoken.create_model(DTPS, width=8, heads=2, depth=4, num_classes=7, at=(1,))
    with pytest.raises(WeightsError, match=f"hold {depth} of the model's 4 blocks"):
        dyntoken.load_weights(model, path)


def test_weights_of_as_many_blocks_load_and_the_method_is_new(tmp_path):
    path = _saved(tmp_path / "whole.safetensors", 4)
    model = dyntoken.create_model(DTPS, width=8, heads=2, depth=4, num_classes=7, at=(1,))
    _, report = dyntoken.load_weights(model, path, return_report=True)
    assert report.missing and all("reducer" in name for name in report.missing)


@pytest.mark.parametrize("batch", [9999, 30, 3, 17])
def test_a_proposed_batch_is_accepted(batch):
    with pytest.raises(ValueError, match="set batch to") as caught:
        mesh.check_batch(batch, mesh.data_mesh(), multiple=2, shards=12)
    proposed = [int(n) for n in re.findall(r"\d+", str(caught.value).partition("set batch to")[2])]
    assert proposed and all(n % 12 == 0 for n in proposed)
    for n in proposed:
        mesh.check_batch(n, mesh.data_mesh(), multiple=2, shards=12)


def test_a_batch_larger_than_the_split_is_told_the_largest():
    with pytest.raises(DataError, match="at most 64"):
        train.build(tiny_config(batch=80))
    assert train.build(tiny_config(batch=64)).steps_per_epoch == 1


def test_a_recipe_given_as_text_is_pointed_to_load(tmp_path):
    with pytest.raises(ValueError, match=r"config\.load\('configs/tps_deit\.py:tiny'\)"):
        train.run("configs/tps_deit.py:tiny", tmp_path)


def test_a_folder_without_its_prefix_is_told_it(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match=f"folder:{re.escape(str(tmp_path))}"):
        dyntoken.data.info(str(tmp_path))


@pytest.mark.parametrize(("content", "what"), [(b"", "is empty"), (b"<html>", "starts with b'<html>'")])
def test_what_is_no_torch_file_is_called_so(tmp_path, content, what):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=f"no torch file: it {what}"):
        dyntoken.load_weights(dyntoken.create_model("deit_tiny_patch8_16", **SMALL), tmp_path / "weights.pth")


def test_a_damaged_checkpoint_names_the_one_before(tmp_path):
    run = train.run(tiny_config(steps=2, checkpoint_steps=1), tmp_path, log=lambda line: None)
    files = [file for file in (tmp_path / "checkpoints" / "2" / "state").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(WeightsError, match="step=1, the one before"):
        dyntoken.load_weights(run.model, tmp_path)
    assert dyntoken.load_weights(run.model, tmp_path, step=1)
