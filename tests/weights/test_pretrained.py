"""`load_pretrained`: every layout read back, what is read off a checkpoint, and one line for what is not."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from safetensors.numpy import save_file

import dyntoken
from dyntoken import weights
from dyntoken.weights import WeightsError, files
from tests.weights import made

EVA = {"rope": "centred", "position": False, "qkv_bias": "qv", "norm_eps": 1e-5}
EVA |= {"layer_scale": 1e-5, "num_classes": 0}
DINO = {"layer_scale": 1e-5}
REGISTERS = {"registers": 3, "embed_class": False, "layer_scale": 1e-5, "num_classes": 0}
TOWER = {"class_token": False, "pool": "map", "activation": "gelu_tanh", "num_classes": 0}
CLIP = {"pre_norm": True, "activation": "quick_gelu", "norm_eps": 1e-5, "num_classes": 0}
# Name of the case: the model's options; words, block, root and spelling of its layout.
LAYOUTS = {
    "vit": ({"norm_eps": 1e-12}, "Hugging Face's ViT", "encoder.layer.{}.", "vit.", 0),
    "vit in memory": ({"norm_eps": 1e-12}, "Hugging Face's ViT", "layers.{}.", "vit.", 1),
    "vit bare": ({"norm_eps": 1e-12, "num_classes": 0}, "Hugging Face's ViT", "encoder.layer.{}.", "", 0),
    "vit pooler": (
        {"norm_eps": 1e-12, "num_classes": 0, "representation_size": 8},
        "Hugging Face's ViT",
        "encoder.layer.{}.",
        "",
        0,
    ),
    "deit": ({"norm_eps": 1e-12, "distilled": True}, "Hugging Face's ViT", "encoder.layer.{}.", "deit.", 0),
    "dinov2": (DINO, "Hugging Face's DINOv2", "encoder.layer.{}.", "dinov2.", 0),
    "dinov2 classifier": (
        DINO | {"pool": "token_mean"},
        "Hugging Face's DINOv2",
        "encoder.layer.{}.",
        "dinov2.",
        1,
    ),
    "dinov2 gate": (
        DINO | {"activation": "swiglu", "mlp_ratio": 5.0},
        "Hugging Face's DINOv2",
        "encoder.layer.{}.",
        "dinov2.",
        1,
    ),
    "dinov2 gate in memory": (
        DINO | {"activation": "swiglu", "mlp_ratio": 5.0},
        "Hugging Face's DINOv2",
        "encoder.layer.{}.",
        "dinov2.",
        2,
    ),
    "dinov3": (EVA, "Hugging Face's DINOv3", "layer.{}.", "", 1),
    "dinov3 in memory": (EVA, "Hugging Face's DINOv3", "model.layer.{}.", "", 1),
    "dinov3 gate": (
        EVA | {"activation": "swiglu", "mlp_hidden": 64, "mlp_split": True, "registers": 2},
        "Hugging Face's DINOv3",
        "layer.{}.",
        "",
        1,
    ),
    "siglip": (TOWER, "Hugging Face's SigLIP", "encoder.layers.{}.", "vision_model.", 0),
    "clip": (CLIP, "Hugging Face's CLIP", "encoder.layers.{}.", "vision_model.", 0),
    "openai": (CLIP, "OpenAI's CLIP", "transformer.resblocks.{}.", "visual.", 0),
    "torchvision": ({}, "torchvision's ViT", "encoder.layers.encoder_layer_{}.", "", 0),
    "torchvision, old": ({}, "torchvision's ViT", "encoder.layers.encoder_layer_{}.", "", 1),
}


def checkpoint(case):
    """A model, its variables, and these as the file of a layout holds them."""
    options, *how = LAYOUTS[case]
    model = made.model(**options)
    variables = made.variables(model)
    tensors = made.written(model, variables, *how)
    for key in [key for key in tensors if key.endswith(".q_bias")]:  # as two layers' biases
        layer = key.removesuffix("q_bias").removesuffix("attn.") + "attention."
        tensors[f"{layer}q_proj.bias"], tensors[f"{layer}v_proj.bias"] = (
            tensors.pop(key),
            tensors.pop(key.replace("q_bias", "v_bias")),
        )
    if case.startswith("dinov3"):
        tensors = {
            key.replace("patch_embeddings.projection", "patch_embeddings"): v for key, v in tensors.items()
        }
        tensors = {k.replace("mlp.fc1_x", "mlp.up_proj"): v for k, v in tensors.items()}
    return model, variables, tensors


def same(one, other):
    """Whether two trees of variables are equal."""
    one, other = weights.flat_variables(one), weights.flat_variables(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], path)


@pytest.mark.thorough
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_is_read(case):
    model, variables, tensors = checkpoint(case)
    found, read, report = dyntoken.load_pretrained(tensors, heads=2, img_size=16, return_report=True)
    same(read, variables)
    assert not report.unexpected and not report.missing and not report.resized
    for name in ("norm_eps", "activation", "qkv_bias", "rope", "registers", "distilled", "img_size"):
        assert getattr(found.plain(), name) == getattr(model.plain(), name), name
    assert (found.pool, found.num_classes) == (model.pool, model.num_classes)
    assert LAYOUTS[case][1] in str(report)


@pytest.mark.thorough
@pytest.mark.parametrize("case", [*LAYOUTS, "timm"])
@pytest.mark.parametrize("bent", [np.ravel, lambda value: value[None], lambda value: np.float32(0)])
def test_an_array_of_other_dimensions_is_read_or_refused(case, bent):
    """Whatever array it is, no error but the one that says so."""
    tensors = checkpoint("dinov3 gate" if case == "timm" else case)[2]
    if case == "timm":
        tensors = weights.export_reference(model := made.model(**REGISTERS), made.variables(model))
    refused = 0
    for key in [key for key in tensors if ".1." not in key]:
        try:
            dyntoken.load_pretrained({**tensors, key: np.asarray(bent(tensors[key]))}, heads=2)
        except WeightsError:
            refused += 1
    assert refused


@pytest.mark.parametrize("case", ["vit", "dinov2", "timm"])
def test_weights_that_deepspeed_did_not_gather_are_called_that(case):
    tensors = weights.export_reference(model := made.model(), made.variables(model))
    if case != "timm":
        tensors = checkpoint(case)[2]
    empty = {key: np.zeros(0, np.float32) for key in tensors}
    for load in (dyntoken.load_pretrained, lambda source: weights.load_weights(model, source)):
        with pytest.raises(WeightsError, match=r"without a value: .*, \.\.\.\. DeepSpeed's ZeRO-3"):
            load(empty)


def test_timm_keys_and_official_ones():
    """Registers without rows, a gate in one layer, LayerScale by both names, wrappers, half precision."""
    model = made.model(**REGISTERS, activation="swiglu", mlp_ratio=5.0, norm_eps=1e-6)
    variables = made.variables(model)
    tensors = weights.export_reference(model, variables)
    same(dyntoken.load_pretrained(tensors, heads=2)[1], variables)
    official = {"mask_token": np.zeros((1, 16), np.float32), "register_tokens": tensors["reg_token"]}
    for key, value in tensors.items():
        official[key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")] = value
    del official["reg_token"]
    shift = np.full((1, 1, 16), 0.5, np.float32)  # the class token's row
    official["cls_token"] = tensors["cls_token"] - shift
    official["pos_embed"] = np.concatenate([shift, tensors["pos_embed"]], axis=1)
    chunks = {key.replace("blocks.", "blocks.0."): value for key, value in official.items()}
    for source in (official, chunks, {"teacher": {f"backbone.{k}": v for k, v in official.items()}}):
        found, read = dyntoken.load_pretrained(source, heads=2)
        np.testing.assert_allclose(
            read["params"]["backbone"]["cls_token"], variables["params"]["backbone"]["cls_token"], atol=1e-6
        )
        assert found.plain().registers == 3 and not found.plain().embed_class
        assert found.plain().activation == "swiglu"


def test_official_dinov3():
    """The bias of keys is masked away, whatever it holds; w1 and w2 are gate and value."""
    options = EVA | {"activation": "swiglu", "mlp_hidden": 64, "mlp_split": True, "registers": 2}
    model = made.model(**options)
    variables = made.variables(model)
    tensors = weights.export_reference(model, variables)
    for names in (("fc1_g", "w1"), ("fc1_x", "w2"), ("fc2", "w3")):
        tensors = {key.replace(*names): value for key, value in tensors.items()}
    tensors["storage_tokens"] = tensors.pop("reg_token")
    tensors |= {"mask_token": np.zeros((1, 16), np.float32), "rope_embed.periods": np.ones(2, np.float32)}
    for key in [key for key in tensors if key.endswith("q_bias")]:
        q, v = tensors.pop(key), tensors.pop(key.replace("q_bias", "v_bias"))
        name = key.replace("q_bias", "qkv.bias")
        tensors[name] = np.concatenate([q, np.full_like(q, np.nan), v])
        tensors[f"{name}_mask"] = np.repeat(np.float32([1, 0, 1]), 16)
    found, read = dyntoken.load_pretrained(tensors, heads=2, img_size=16)
    same(read, variables)
    assert found.plain().rope == "centred" and found.plain().norm_eps == 1e-5


def test_deit3_and_distilled_in_timm_keys():
    model = made.model(layer_scale=1e-5, embed_class=False)
    variables = made.variables(model)
    tensors = weights.export_reference(model, variables)
    theirs = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in tensors.items()
    }
    found, read = dyntoken.load_pretrained({"model": theirs}, heads=2)
    same(read, variables)
    assert found.arch.startswith("deit3")
    model = made.model(distilled=True)
    variables = made.variables(model)
    found, read = dyntoken.load_pretrained(weights.export_reference(model, variables), heads=2)
    same(read, variables)
    assert found.plain().distilled


def test_what_is_assumed_is_said(caplog):
    _, _, tensors = checkpoint("vit")
    with caplog.at_level(logging.WARNING, "dyntoken.weights"):
        found, _ = dyntoken.load_pretrained(tensors)
    assert found.plain().heads == 1 and found.plain().norm_eps == 1e-12
    assert "assumed norm_eps=1e-12, activation='gelu', heads=1, which the file does not tell" in caplog.text
    found, _, report = dyntoken.load_pretrained(tensors, name="vit_mini_patch4_28", return_report=True)
    assert found.plain().heads == 2 and found.plain().stem == "patch" and found.num_classes == 5
    assert "assumed" not in str(report)


CONFIG = {"model_type": "vit", "num_attention_heads": 4, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new"}
CONFIG |= {"image_size": 16}


@pytest.fixture
def folder(tmp_path):
    """A folder as transformers writes it."""
    _, _, tensors = checkpoint("vit")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_a_folder_with_its_configuration(folder, caplog):
    with caplog.at_level(logging.INFO, "dyntoken.weights"):
        model, _ = dyntoken.load_pretrained(folder)
    body = model.plain()
    assert (body.heads, body.norm_eps, body.activation) == (4, 1e-5, "gelu_tanh")
    assert "assumed" not in caplog.text and caplog.records[0].levelname == "INFO"
    assert (
        "found Hugging Face's ViT layout: width 16, depth 2, heads 4, patch_size 4, 16x16 pixels"
        in caplog.text
    )
    model, _ = dyntoken.load_pretrained(folder / "model.safetensors", heads=2)
    assert model.plain().heads == 2


def test_positions_are_resized_as_the_library_of_the_file_does(folder):
    """transformers: bicubic without antialias; timm and registers: with it. A keyword chooses."""
    _, bicubic, report = dyntoken.load_pretrained(folder, img_size=(12, 20), return_report=True)
    assert report.resized == ("backbone/pos_embed: [1, 17, 16] -> [1, 16, 16]",)
    ours = dyntoken.load_pretrained(folder, img_size=(12, 20), resize="timm")[1]
    same(bicubic, dyntoken.load_pretrained(folder, img_size=(12, 20), resize="bicubic")[1])
    assert not np.allclose(*(v["params"]["backbone"]["pos_embed"] for v in (bicubic, ours)))
    tensors = files.read(folder).tensors
    loaded = dyntoken.load_weights(made.model(img_size=(12, 20), resize="timm"), tensors)
    same(bicubic, loaded)  # the source's rule, not the model's


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "resnet"}, r"config.json describes a 'resnet' model, which is not read.*pass name="),
        ({"model_type": "vit", "hidden_act": "snake"}, "config.json has the activation 'snake'"),
        (
            {"model_type": "dinov3_vit", "use_gated_mlp": True, "hidden_act": "gelu"},
            "a gated MLP with 'gelu' is not read",
        ),
        ({"architecture": "vit_base_patch16_rpn_224"}, "norms behind the two branches"),
        (
            {"architecture": "x", "model_args": {"act_layer": "prelu"}},
            "has act_layer='prelu', which is not read",
        ),
        ([1], r"config.json: cannot be read \(no object\)"),
    ],
)
def test_a_configuration_that_is_not_read(folder, config, message):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message) as error:
        dyntoken.load_pretrained(folder)
    assert "\n" not in str(error.value)


def test_timm_configuration(tmp_path):
    """The architecture's own name, its pooling and what its images were prepared with."""
    model = dyntoken.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    variables = made.variables(model)
    save_file(weights.export_reference(model, variables), tmp_path / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9}
    about = {"architecture": "vit_tiny_patch16_224", "global_pool": "avg", "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(about))
    found, read, report = dyntoken.load_pretrained(tmp_path, return_report=True)
    same(read, variables)
    assert (found.arch, found.pool, found.plain().heads) == ("vit_tiny_patch16_224", "mean", 3)
    assert "mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.9" in str(report)
    about["model_args"] = {"num_heads": 2, "act_layer": "quick_gelu", "unknown": 3}
    (tmp_path / "config.json").write_text(json.dumps(about))
    found, _ = dyntoken.load_pretrained(tmp_path)
    assert (found.plain().heads, found.plain().activation) == (2, "quick_gelu")


def test_a_method_a_new_classifier_and_other_channels(folder):
    model, variables, report = dyntoken.load_pretrained(
        folder, method="etps", keep=0.5, at=(1,), num_classes=3, in_chans=1, return_report=True
    )
    assert (model.method, model.keep, model.at, model.num_classes) == ("etps", 0.5, (1,), 3)
    assert variables["params"]["head"]["cls"]["kernel"].shape == (16, 3)
    assert variables["params"]["backbone"]["patch_embed"]["proj"]["kernel"].shape == (4, 4, 1, 16)
    assert "the classifier of 3 classes starts fresh" in str(report)
    assert dyntoken.load_pretrained(folder, num_classes=0)[0].num_classes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 18}, r"not divisible by patch_size \(4, 4\); the nearest that fits is \(16, 16\)"),
        ({"keep": 0.5}, "keep= needs method="),
        ({"method": "dtsp"}, "dtsp"),
        ({"name": "vit_tiny_patch16_244x"}, "unknown model"),
        ({"widht": 3}, "widht"),
        ({"resize": "cubic"}, "resize='cubic'"),
        ({"depth": 3}, "another depth"),
        ({"width": 32}, "another shape"),
    ],
)
def test_wrong_keywords(folder, options, message):
    with pytest.raises(ValueError, match=message) as error:
        dyntoken.load_pretrained(folder, **options)
    assert "\n" not in str(error.value)


def test_arrays_of_no_known_family():
    with pytest.raises(
        WeightsError,
        match=r"no vision tr.*\(a ResNet's layout: layer1.0.conv1.weight.*timm's ViT keys, ours.*pass name=",
    ):
        dyntoken.load_pretrained({"layer1.0.conv1.weight": np.zeros((2, 2, 1, 1), np.float32)})
    tensors = checkpoint("vit")[2]
    lacking = {key: value for key, value in tensors.items() if "layer.1.layernorm_before" not in key}
    with pytest.raises(WeightsError, match=r"lacks 2 of the model's arrays .*norm1"):
        dyntoken.load_pretrained(lacking)
    strange = {**tensors, "vit.encoder.layer.0.adapter.weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(WeightsError, match=r"no place for 1 arrays .*adapter.weight"):
        dyntoken.load_pretrained(strange)


def test_our_own_file_rebuilds_its_model(tmp_path):
    """Every keyword comes from the header, also those that no array tells."""
    name = "dtps_deit_tiny_patch16_224"
    options = {"heads": 4, "norm_eps": 1e-3, "at": (1,), "keep": (0.5,), "temperature": 3.0}
    model = dyntoken.create_model(name, **made.SMALL | {"width": 64} | options)
    variables = made.variables(model)
    weights.save_weights(tmp_path / "w.safetensors", variables, model=model)
    found, read = dyntoken.load_pretrained(tmp_path / "w.safetensors")
    assert found == model
    same(read, variables)
    other, _ = dyntoken.load_pretrained(tmp_path / "w.safetensors", method="etps", at=(0,))
    assert (other.method, other.at, other.plain().heads) == ("etps", (0,), 4)


def test_the_weights_that_ship():
    model, _ = dyntoken.load_pretrained("pretrained:vit_mini_patch4_28")
    assert model == dyntoken.create_model("vit_mini_patch4_28")


@pytest.mark.thorough
def test_a_run(tmp_path):
    from dyntoken import train
    from tests.train.tiny import tiny_config

    train.run(tiny_config(steps=1), str(tmp_path / "run"), log=lambda line: None)
    model, variables = dyntoken.load_pretrained(tmp_path / "run")
    run = dyntoken.load_run(tmp_path / "run")
    assert model == run.model
    same(variables, run.variables)


@pytest.mark.parametrize("prefer", ["ema", "params"])
@pytest.mark.parametrize(
    "where", ["model", "state_dict", "net", "module.", "_orig_mod.", "dino", "both", "half"]
)
def test_wrappers(where, prefer):
    """What trainers put around a state dict; where there are two, `prefer` chooses."""
    model = made.model(norm_eps=1e-6)
    one, two = (weights.export_reference(model, made.variables(model, seed)) for seed in (0, 1))
    wanted, source = one, {where: one, "epoch": 3, "args": {"lr": 0.1}}
    if where.endswith("."):
        source = {f"{where}{key}": value for key, value in one.items()}
    if where == "dino":
        source = {
            "teacher": {f"backbone.{k}": v for k, v in one.items()},
            "student": {f"module.backbone.{k}": v for k, v in two.items()},
        }
    if where == "both":
        source = {"model": two, "model_ema": one}
    if where in ("dino", "both") and prefer == "params":
        wanted = two
    if where == "half":
        wanted = {key: value.astype(np.float16).astype(np.float32) for key, value in one.items()}
        source = {key: value.astype(np.float16) for key, value in one.items()}
    found, read = dyntoken.load_pretrained(source, heads=2, prefer=prefer)
    assert found.num_classes == 5
    exported = weights.export_reference(found, read)
    for key, value in wanted.items():
        np.testing.assert_array_equal(exported[key], value, key)


def test_another_backbone_and_a_cascade_by_name():
    t2t = dyntoken.create_model("t2t_vit_7", width=32, depth=1, heads=2, num_classes=3, img_size=32)
    variables = made.variables(t2t)
    tensors = weights.export_reference(t2t, variables)
    options = {"width": 32, "depth": 1, "heads": 2, "img_size": 32}
    _, read = dyntoken.load_pretrained(tensors, name="t2t_vit_7", num_classes=3, **options)
    same(read, variables)
    dense = made.model(img_size=(32, 32), patch_size=16)
    tensors = weights.export_reference(dense, made.variables(dense))
    exits = {"exits": ((2, 2),), "name": "dvt_deit_small"}
    cascade, read = dyntoken.load_pretrained(tensors, heads=2, **exits)
    assert len(cascade.exits) == 1 and cascade.num_classes == 5
