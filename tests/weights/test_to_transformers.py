"""Weights in transformers' files: the very names, the same bits read back, one line for what has no class."""

from __future__ import annotations

import json

import numpy as np
import pytest

import dyntoken
from dyntoken import weights
from dyntoken.tools import convert
from dyntoken.weights import WeightsError
from tests.weights import made
from tests.weights.test_pretrained import LAYOUTS

WRITTEN = ("vit", "vit bare", "vit pooler", "deit", "dinov2 classifier", "dinov3", "dinov3 gate")
OPTIONS = {case: LAYOUTS[case][0] for case in WRITTEN} | {
    "deit one head": {"norm_eps": 1e-12, "registers": 1},
    "dinov2 gate": {"layer_scale": 1e-5, "activation": "swiglu", "mlp_ratio": 6.0, "pool": "token_mean"},
    "dinov2 bare": {"layer_scale": 1e-5, "num_classes": 0},
    "dinov2 registers": {"registers": 3, "embed_class": False, "layer_scale": 1e-5, "pool": "token_mean"},
    "wide": {"img_size": (16, 24), "activation": "gelu_tanh", "qkv_bias": False, "in_chans": 1},
}


@pytest.mark.parametrize("case", ["vit", "vit bare", "vit pooler"])
def test_names_are_those_of_the_files(case):
    model = made.model(**OPTIONS[case])
    variables = made.variables(model)
    tensors, _ = weights.to_transformers(model, variables)
    want = made.written(model, variables, *LAYOUTS[case][1:])
    assert tensors.keys() == want.keys()
    assert all(np.array_equal(tensors[key], value) for key, value in want.items())


@pytest.mark.parametrize("case", OPTIONS)
def test_they_are_read_back(case):
    """`to_transformers` compares what it wrote with the model: here that it did."""
    model = made.model(**OPTIONS[case])
    variables = made.variables(model, seed=1)
    tensors, config = weights.to_transformers(model, variables)
    again, back = dyntoken.load_pretrained(tensors, config=config)
    one, other = weights.flat_variables(variables), weights.flat_variables(back)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[path], other[path]) for path in one)
    assert json.loads(json.dumps(config)) == config or case == "wide"
    assert again.num_classes == model.num_classes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layer_scale": 1e-5},
            "reads pool='token', transformers' dinov2 has one that reads pool='token_mean'",
        ),
        (LAYOUTS["dinov3"][0] | {"num_classes": 5}, "transformers' dinov3_vit has none; .* num_classes=0"),
        ({"qk_norm": True}, r"transformers' vit has no place for blocks\.0\.attn\.[qk]_norm"),
        ({"pre_norm": True}, "transformers' vit has no place for norm_pre"),
        ({"fc_norm": True, "pool": "mean"}, "reads pool='mean'"),
        ({"skip_lam": 2.0}, r"transformers' vit does not compute it: skip_lam=2\.0, there 1\.0"),
        ({"proj_bias": False}, "needs a bias in every layer"),
    ],
)
def test_what_has_no_class_is_refused(options, message):
    model = made.model(**options)
    with pytest.raises(WeightsError, match=message):
        weights.to_transformers(model, made.variables(model))


def test_another_backbone_is_refused():
    model = dyntoken.create_model("dvt_deit_small", img_size=96)
    with pytest.raises(WeightsError, match="written for transformers are ViT, DeiT, DINOv2 and DINOv3"):
        weights.to_transformers(model, {})


def test_convert_writes_a_folder_and_reads_it(tmp_path, capsys):
    model = dyntoken.create_model("evit_vit_small_patch16_224", **made.SMALL, at=(1,), norm_eps=1e-12)
    weights.save_weights(tmp_path / "ours.safetensors", made.variables(model), model=model)
    there, back = tmp_path / "theirs", tmp_path / "back.safetensors"
    assert convert.main([str(tmp_path / "ours.safetensors"), str(there), "--to=transformers"]) == 0
    assert {path.name for path in there.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert convert.main([str(there), str(back)]) == 0
    assert "as preprocessor_config.json says: " in capsys.readouterr().out
    dense, read = dyntoken.load_pretrained(back)
    assert dense.method is None and dyntoken.preprocess(dense).mean == dyntoken.preprocess(model).mean
    one, other = weights.flat_variables(made.variables(model)), weights.flat_variables(read)
    assert all(np.array_equal(one[path], other[path]) for path in other) and one.keys() == other.keys()
    config = json.loads((there / "config.json").read_text())
    named = config | {"id2label": dict(zip(config["id2label"], "abcde", strict=True))}
    (there / "config.json").write_text(json.dumps(named))
    assert convert.main([str(there), str(tmp_path / "again"), "--to=transformers"]) == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["label2id"] == dict(
        zip("abcde", range(5), strict=True)
    )
    assert convert.main([str(back), str(tmp_path / "x.npz"), "--to=transformers"]) == 1
    assert "--to=transformers writes a folder" in capsys.readouterr().err


@pytest.mark.parametrize("case", OPTIONS)
def test_transformers_opens_it(case, tmp_path):
    """Where it is installed: no array is missing or left over, and the final rows are ours."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = made.model(**OPTIONS[case])
    variables = made.variables(model)
    tensors, config = weights.to_transformers(model, variables)
    weights.files.write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    cls = getattr(transformers, config["architectures"][0])
    theirs, about = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not about["unexpected_keys"] and not about["mismatched_keys"]
    assert all(".pooler." in f".{key}" for key in about["missing_keys"]), about["missing_keys"]
    images = np.random.default_rng(0).standard_normal((2, *model.input_shape), np.float32)
    with torch.no_grad():
        found = theirs.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    if model.num_classes:
        np.testing.assert_allclose(found.logits, model.apply(variables, images).logits, atol=2e-4)
    else:
        rows = model.apply(variables, images, record=("features",)).tokens.x
        np.testing.assert_allclose(found.last_hidden_state, rows, atol=2e-4)
