"""`tools.convert`: there and back, and what does not fit."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dyntoken
from dyntoken.analysis import timing
from dyntoken.tools import convert
from dyntoken.weights import load_weights, save_weights

NAME = "dtps_vit_mini_patch4_28"
SMALL = ["--set", "width=24", "--set", "depth=2", "--set", "heads=2", "--set", "stem=patch", "--at=1"]
OPTIONS = {"width": 24, "depth": 2, "heads": 2, "stem": "patch", "at": (1,)}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    model = dyntoken.create_model(NAME, **OPTIONS)
    path = tmp_path_factory.mktemp("weights") / "ours.safetensors"
    save_weights(path, timing.random_variables(model), model=model)
    return path


def run(*argv):
    return convert.main([*map(str, argv), f"--model={NAME}", *SMALL])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_to_timm_and_back_is_the_identity(ours, tmp_path, capsys, suffix):
    there, back = tmp_path / f"timm{suffix}", tmp_path / "back.safetensors"
    assert run(ours, there, "--to=timm") == 0
    assert run(there, back) == 0
    assert f"written: {back}" in capsys.readouterr().out
    first, second = load_file(ours), load_file(back)
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)
    model = dyntoken.create_model(NAME, **OPTIONS)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), *(load_weights(model, p) for p in (ours, back)))
    assert jax.tree.all(same)


def test_timm_keys_and_layouts(ours, tmp_path):
    assert run(ours, tmp_path / "t.npz", "--to=timm") == 0
    kernel = load_file(ours)["backbone/trunk/blocks_1/attn/qkv/kernel"]
    with np.load(tmp_path / "t.npz") as timm:
        assert timm["blocks.1.attn.qkv.weight"].shape == (72, 24)
        np.testing.assert_array_equal(timm["blocks.1.attn.qkv.weight"], kernel.T)
        assert timm["patch_embed.proj.weight"].shape == (24, 1, 4, 4)


def test_what_does_not_fit_is_refused_unless_partial(ours, tmp_path, capsys):
    target = tmp_path / "dense.safetensors"
    argv = [str(ours), str(target), "--model=vit_mini_patch4_28", *SMALL[:-1]]
    assert convert.main(argv) == 1
    error = capsys.readouterr().err
    assert "does not fit vit_mini_patch4_28 exactly: 10 unexpected (" in error and error.count("\n") == 1
    assert not target.exists()
    assert convert.main([*argv, "--partial"]) == 0
    assert not any("reducer" in key for key in load_file(target))


def test_what_has_no_place_says_which_model_takes_it(ours, tmp_path, capsys):
    """LayerScale in a file, none in the model: an error with the remedy, or left out with --partial."""
    model = dyntoken.create_model(NAME, **OPTIONS, layer_scale=0.1)
    save_weights(tmp_path / "scaled.safetensors", timing.random_variables(model), model=model)
    target = tmp_path / "out.safetensors"
    assert run(tmp_path / "scaled.safetensors", target) == 1
    error = capsys.readouterr().err
    assert "layer_scale=" in error and error.count("\n") == 1 and not target.exists()
    assert run(tmp_path / "scaled.safetensors", target, "--set", "layer_scale=0.1") == 0
    assert run(tmp_path / "scaled.safetensors", target, "--partial") == 0


def test_an_absent_file_is_not_sent_to_the_command_that_was_run(tmp_path, capsys):
    assert run(tmp_path / "absent.pth", tmp_path / "out.safetensors") == 1
    error = capsys.readouterr().err
    assert "absent.pth" in error and "tools.convert IN OUT" not in error


def test_without_a_model_the_file_tells(ours, tmp_path, capsys):
    """timm's keys and a mask token that nothing needs; keywords still come first."""
    assert run(ours, tmp_path / "timm.safetensors", "--to=timm") == 0
    tensors = load_file(tmp_path / "timm.safetensors") | {"mask_token": np.zeros((1, 24), np.float32)}
    tensors = {key: value for key, value in tensors.items() if "score_predictor" not in key}
    save_file(tensors, tmp_path / "dense.safetensors")
    target = tmp_path / "out.safetensors"
    assert convert.main([str(tmp_path / "dense.safetensors"), str(target), "--set", "heads=2"]) == 0
    assert "found timm's ViT layout: width 24, depth 2, heads 2" in capsys.readouterr().out
    assert (load_file(target)["backbone/cls_token"] == tensors["cls_token"]).all()
    assert convert.main([str(ours), str(target)]) == 0  # ours hold their own description
    assert dyntoken.load_pretrained(target)[0] == dyntoken.create_model(NAME, **OPTIONS)
