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

EVA = {"rope": "centred", "position": False, "naming": "eva", "qkv_bias": "qv", "norm_eps": 1e-5}
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
        tensors = {key.replace("patch_embeddings.projection", "patch_embeddings"): v for key, v in tensors.items()}
        tensors = {k.replace("mlp.fc1_x", "mlp.up_proj"): v for k, v in tensors.items()}
    return model, variables, tensors


def same(one, other):
    """Whether two trees of variables are equal."""
    one, other = weights.flat_variables(one), weights.flat_variables(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], path)


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
