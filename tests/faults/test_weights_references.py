"""Constructor arguments of the official classes: each is what it says, against a plain restatement in numpy."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken import weights
from dyntoken.weights import official

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "nn.ReLU": lambda x: np.maximum(x, 0),
    "nn.SiLU": lambda x: x / (1 + np.exp(-x)),
}


def tensors_of(repository, cls, constructor):
    """A random state dict of an official class."""
    reference = official.build(repository, cls, constructor)
    shapes = weights.shapes_of(reference.model)
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(0, 0.3, shape).astype(np.float32) for path, shape in shapes.items()}
    return weights.reference_keys(reference.model, no_embed_class=bool(reference.grid_only)).export(flat)


def timm_vit(t, images, given):
    """timm's `VisionTransformer` in float64; `images` NHWC."""
    t = {key: value.astype(np.float64) for key, value in t.items()}
    c = {"global_pool": "token", "fc_norm": None, "final_norm": True, **SMALL, **given}
    act = ACTIVATIONS[c.get("act_layer", "gelu")]

    def norm(x, name, eps=1e-6):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0.0)

    n, p = len(images), 4
    x = images.astype(np.float64).reshape(n, 4, p, 4, p, 3).transpose(0, 1, 3, 5, 2, 4).reshape(n, 16, -1)
    x = x @ t["patch_embed.proj.weight"].reshape(16, -1).T + t.get("patch_embed.proj.bias", 0.0)
    first = [np.repeat(t[name], n, axis=0) for name in ("cls_token", "reg_token") if name in t]
    added = t.get("pos_embed", 0.0)
    if c.get("no_embed_class"):
        x = np.concatenate([*first, x + added], axis=1)
    else:
        x = np.concatenate([*first, x], axis=1) + added
    prefix = x.shape[1] - 16
    x = norm(x, "norm_pre") if c.get("pre_norm") else x
    for index in range(2):
        block = f"blocks.{index}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(n, -1, 3, 2, 8)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        if c.get("qk_norm"):
            q, k = norm(q, f"{block}.attn.q_norm"), norm(k, f"{block}.attn.k_norm")
        a = np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(8))
        y = (a / a.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(n, -1, 16)
        x = x + linear(y, f"{block}.attn.proj")
        y = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        if c.get("mlp_layer") == "SwiGLUPacked":
            gate, value = np.split(y, 2, axis=-1)
            y = act(gate) * value
        else:
            y = act(y)
        x = x + linear(y, f"{block}.mlp.fc2")
    after = c["global_pool"] == "avg" if c["fc_norm"] is None else c["fc_norm"]
    x = norm(x, "norm") if c["final_norm"] and not after else x
    if c["global_pool"] == "token":
        x = x[:, 0]
    else:
        x = x[:, 0 if c.get("pool_include_prefix") else prefix :].mean(1)
    return linear(norm(x, "fc_norm") if c["final_norm"] and after else x, "head")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"qk_norm": True},
        {"pre_norm": True},
        {"reg_tokens": 3},
        {"reg_tokens": 3, "no_embed_class": True, "class_token": False, "global_pool": "avg"},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg", "pool_include_prefix": True},
        {"fc_norm": True},
        {"final_norm": False},
        {"proj_bias": False},
        {"pos_embed": "none"},
        {"dynamic_img_size": True, "dynamic_img_pad": True},
        {"act_layer": "gelu_tanh"},
        {"act_layer": "quick_gelu"},
        {"act_layer": "nn.ReLU"},
        {"act_layer": "nn.SiLU"},
        {"act_layer": "nn.SiLU", "mlp_layer": "SwiGLUPacked"},
    ],
    ids=lambda given: "-".join(f"{k}={v}" for k, v in given.items()) or "plain",
)
def test_timm_arguments(given):
    constructor = {**SMALL, **given}
    tensors = tensors_of("timm", "VisionTransformer", constructor)
    model, variables = weights.import_reference("timm", "VisionTransformer", constructor, tensors)
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    found = jax.jit(lambda v, x: model.apply(v, x).logits)(variables, images)
    np.testing.assert_allclose(found, timm_vit(tensors, images, given), rtol=1e-3, atol=1e-4)


def test_a_reducer_works_with_registers_and_needs_the_class_token():
    options = {
        "img_size": 16,
        "width": 16,
        "depth": 3,
        "heads": 2,
        "patch_size": 4,
        "registers": 2,
        "at": (1,),
    }
    model = dyntoken.create_model("evit_deit_tiny_patch16_224", **options)
    images = np.zeros((1, 16, 16, 3), np.float32)
    out = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], images)
    assert out.reductions[0].keep.shape == (1, 12)
    with pytest.raises(ValueError, match="class token"):
        dyntoken.create_model("evit_deit_tiny_patch16_224", **options, class_token=False, pool="mean")


SWIN = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 8,
    "depths": (1, 1),
    "num_heads": (1, 2),
    "num_classes": 5,
}


def test_swin_absolute_positions():
    """`ape` adds an embedding to the cells of the first stage; a zero one changes nothing."""
    tensors = tensors_of("microsoft/Swin-Transformer", "SwinTransformer", {**SWIN, "ape": True})
    assert tensors["absolute_pos_embed"].shape == (1, 64, 8)
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)

    def logits(tensors, ape):
        options = {**SWIN, "ape": ape, "patch_norm": False}
        kept = {key: value for key, value in tensors.items() if not key.startswith("patch_embed.norm")}
        model, variables = weights.import_reference(
            "microsoft/Swin-Transformer", "SwinTransformer", options, kept
        )
        return np.asarray(jax.jit(lambda v, x: model.apply(v, x).logits)(variables, images))

    plain = {key: value for key, value in tensors.items() if key != "absolute_pos_embed"}
    zero = {**tensors, "absolute_pos_embed": np.zeros_like(tensors["absolute_pos_embed"])}
    np.testing.assert_allclose(logits(zero, True), logits(plain, False), rtol=1e-5, atol=1e-6)
    # One vector for all cells is the same as that much more bias of the patch product.
    same = np.ones_like(tensors["absolute_pos_embed"])
    more = {**plain, "patch_embed.proj.bias": plain["patch_embed.proj.bias"] + 1}
    np.testing.assert_allclose(
        logits({**tensors, "absolute_pos_embed": same}, True), logits(more, False), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("repository", "cls", "constructor"),
    [
        ("timm", "VisionTransformer", SMALL),
        pytest.param("youweiliang/evit", "EViT", SMALL, marks=pytest.mark.slow),
        ("microsoft/Swin-Transformer", "SwinTransformer", SWIN),
        pytest.param(
            "whai362/PVT",
            "PyramidVisionTransformer",
            {
                **{"img_size": 32, "patch_size": 4, "num_classes": 5, "embed_dims": (8,) * 4},
                **{"num_heads": (1,) * 4, "depths": (1,) * 4, "sr_ratios": (2, 2, 1, 1)},
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["timm", "evit", "swin", "pvt"],
)
def test_dropout_of_attention_weights(repository, cls, constructor):
    """Nothing in evaluation; in training other numbers, the same for the same key."""
    images = np.random.default_rng(1).normal(size=(2, constructor["img_size"], constructor["img_size"], 3))
    constructor = {**constructor, "drop_path_rate": 0.0}
    tensors = tensors_of(repository, cls, constructor)

    def logits(rate, seed=None):
        model, variables = weights.import_reference(
            repository, cls, {**constructor, "attn_drop_rate": rate}, tensors
        )
        more = {} if seed is None else {"train": True, "rngs": {"dropout": jax.random.key(seed)}}
        return np.asarray(jax.jit(lambda v, x: model.apply(v, x, **more).logits)(variables, images))

    np.testing.assert_array_equal(logits(0.5), logits(0.0))
    drawn = logits(0.5, 0)
    np.testing.assert_array_equal(drawn, logits(0.5, 0))
    assert np.abs(drawn - logits(0.5, 1)).max() > 1e-3 and np.abs(drawn - logits(0.0, 0)).max() > 1e-3
