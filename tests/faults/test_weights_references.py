"""Constructor arguments of the official classes: each is what it says, against a plain restatement in numpy."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken import weights
from dyntoken.backbones import swin
from dyntoken.nn.attention import Attention
from dyntoken.weights import official
from tests.faults.references import (
    ACTIVATIONS,
    SWIN,
    attention,
    convolved,
    fields_of,
    filled,
    layer,
    tensors_of,
)

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


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
        y = norm(y, f"{block}.attn.norm") if c.get("scale_attn_norm") else y
        x = x + linear(y, f"{block}.attn.proj")
        y = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        if c.get("mlp_layer") == "SwiGLUPacked":
            gate, value = np.split(y, 2, axis=-1)
            y = act(gate) * value
        else:
            y = act(y)
        y = norm(y, f"{block}.mlp.norm") if c.get("scale_mlp_norm") else y
        x = x + linear(y, f"{block}.mlp.fc2")
    after = c["global_pool"] in ("avg", "max", "avgmax") if c["fc_norm"] is None else c["fc_norm"]
    x = norm(x, "norm") if c["final_norm"] and not after else x
    rows = x[:, 0 if c.get("pool_include_prefix") else prefix :]
    if c["global_pool"] == "map":
        q = (t["attn_pool.latent"] @ t["attn_pool.q.weight"].T + t["attn_pool.q.bias"]).reshape(1, 2, 1, 8)
        k, v = linear(rows, "attn_pool.kv").reshape(n, -1, 2, 2, 8).transpose(2, 0, 3, 1, 4)
        a = np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(8))
        y = (a / a.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(n, 16)
        x = linear(y, "attn_pool.proj")
        y = act(linear(norm(x, "attn_pool.norm"), "attn_pool.mlp.fc1"))
        x = x + linear(y, "attn_pool.mlp.fc2")
    elif c["global_pool"] == "prr":
        h = x.reshape(n, -1, 2, 8).transpose(0, 2, 1, 3)
        a = np.exp(h @ h.swapaxes(-1, -2) / math.sqrt(8))
        y = (a / a.sum(-1, keepdims=True) @ h).transpose(0, 2, 1, 3).reshape(n, -1, 16)
        x = y[:, 0] if "cls_token" in t else y.mean(1)
    else:
        pools = {
            "token": x[:, 0],
            "avg": rows.mean(1),
            "max": rows.max(1),
            "avgmax": (rows.mean(1) + rows.max(1)) / 2,
        }
        x = pools[c["global_pool"]]
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
        {"global_pool": "max", "pool_include_prefix": True, "reg_tokens": 2},
        {"global_pool": "avgmax", "reg_tokens": 2},
        {"global_pool": "map", "class_token": False},
        {"global_pool": "map", "fc_norm": True, "pool_include_prefix": True},
        {"global_pool": "prr", "class_token": False, "reg_tokens": 1},
        {"global_pool": "prr"},
        {"scale_attn_norm": True, "drop_rate": 0.2},
        {"scale_mlp_norm": True, "patch_drop_rate": 0.5},
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
        {"act_layer": "mish"},
        {"act_layer": "hard_swish"},
        {"act_layer": "nn.LeakyReLU"},
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


TPS_SMALL = {**SMALL, "prune_loc": [1], "keep_ratio": [0.5]}


def test_dropout_before_the_classifier_and_of_patches():
    """Evaluation is that of the plain class; training draws, the same for the same key."""
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    tensors = tensors_of("timm", "VisionTransformer", SMALL)

    def run(train=False, seed=0, **given):
        model, variables = weights.import_reference("timm", "VisionTransformer", {**SMALL, **given}, tensors)
        more = {"train": True, "rngs": {"dropout": jax.random.key(seed)}} if train else {}
        return jax.jit(lambda v, x: model.apply(v, x, record=("features",), **more))(variables, images)

    plain = run()
    for given in ({"drop_rate": 0.5}, {"patch_drop_rate": 0.75}):
        np.testing.assert_array_equal(run(**given).logits, plain.logits)
        drawn = run(True, **given)
        np.testing.assert_array_equal(drawn.logits, run(True, **given).logits)
        assert np.abs(drawn.logits - run(True, 1, **given).logits).max() > 1e-3
    tokens = drawn.tokens
    assert tokens.patches.shape == (2, 4, 16)  # a quarter of 16 patches is left
    for image in range(2):
        place = np.asarray(tokens.place[image])
        np.testing.assert_array_equal(np.asarray(tokens.carrier[image])[place], np.arange(4))
        assert (np.asarray(tokens.carrier[image]) >= 0).sum() == 4


def test_tps_arguments_of_its_head_and_scores():
    fields = fields_of(
        "megvii-research/TPS-CVPR2023", "DynamicVit", **TPS_SMALL, drop_rate=0.1, shuffle_score=True
    )
    assert fields["model"].head_dropout == 0.1
    assert dict(fields["model"].method_options) == {"shuffle": True}


LVVIT = ("zihangJiang/TokenLabeling", "LV_ViT", {**SMALL, "p_emb": "1", "return_dense": True})


def test_lvvit_halves_of_blocks():
    """ "mha" and "ffn" are the halves of "tr"; with skip_lam they norm `skip_lam` times the rows."""
    repository, cls, given = LVVIT
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)

    def logits(tensors, **more):
        model, variables = weights.import_reference(repository, cls, {**given, **more}, tensors)
        return np.asarray(jax.jit(lambda v, x: model.apply(v, x).logits)(variables, images))

    whole = tensors_of(repository, cls, {**given, "order": ("tr", "ffn")})
    assert not any("norm1" in key for key in whole if key.startswith("blocks.1."))
    halves = {}
    for key, value in whole.items():
        for old, new, part in (
            ("blocks.1.", "blocks.2.", ""),
            ("blocks.0.", "blocks.0.", "1 attn"),
            ("blocks.0.", "blocks.1.", "2 mlp"),
        ):
            wanted = not part or any(f".{name}" in key for name in (f"norm{part[0]}.", f"{part[2:]}."))
            if key.startswith(old) and wanted:
                halves[new + key.removeprefix(old)] = value
        if not key.startswith("blocks."):
            halves[key] = value
    found = logits(halves, order=("mha", "ffn", "ffn"))
    np.testing.assert_allclose(found, logits(whole, order=("tr", "ffn")), rtol=1e-5, atol=1e-5)
    fields = fields_of(repository, cls, **given, order=("mha", "ffn"), skip_lam=2.0)
    body = fields["model"].plain()
    assert [body._block(i)["half"] for i in range(2)] == ["attention", "mlp"]
    assert body._block(0)["norm_eps"] == 1e-5 / 4
    with pytest.raises(weights.WeightsError, match="order"):
        official.build(repository, cls, {**given, "order": ("conv", "tr")})


def test_lvvit_rates_per_block_and_width_of_heads():
    repository, cls, given = LVVIT
    rates = [0.1, 0.3]
    body = fields_of(repository, cls, **given, drop_path_rate=rates, drop_path_decay="given")["model"].plain()
    assert [body._block(i)["drop_path"] for i in range(2)] == rates
    with pytest.raises(weights.WeightsError, match="one per block"):
        official.build(repository, cls, {**given, "drop_path_decay": "given"})
    tensors = tensors_of(repository, cls, {**given, "head_dim": 3})
    assert tensors["blocks.0.attn.qkv.weight"].shape == (18, 16)
    assert tensors["blocks.0.attn.proj.weight"].shape == (16, 6)
    dropped = fields_of("raoyongming/DynamicViT", "LVViT_Teacher", **given, attn_drop_rate=0.1)
    assert dropped["attn_dropout"] == 0.1


def test_heads_of_their_own_width():
    x = np.random.default_rng(1).normal(size=(1, 4, 6)).astype(np.float32)
    module = Attention(2, head_dim=5, norm_eps=None)
    variables = filled(module, x)
    expected = attention(x[0], layer(variables, "qkv"), layer(variables, "proj"), 2)
    np.testing.assert_allclose(module.apply(variables, x)[0][0], expected, rtol=1e-4, atol=1e-5)
    windows = swin.WindowAttention((2, 2), 2, 0, 2, head_dim=5)
    variables = filled(windows, x, None, ())
    table = variables["params"]["relative_position_bias_table"]  # [9, heads], by (row, column) distance + 1
    cells = np.array([(0, 0), (0, 1), (1, 0), (1, 1)])
    distance = cells[:, None] - cells[None] + 1
    bias = table[distance[..., 0] * 3 + distance[..., 1]].transpose(2, 0, 1)
    expected = attention(x[0], layer(variables, "qkv"), layer(variables, "proj"), 2, bias)
    np.testing.assert_allclose(windows.apply(variables, x, None, ())[0], expected, rtol=1e-4, atol=1e-5)


def test_psvit_coordinates():
    """The points lie on a map of `downsample_ratio` image pixels per unit, column by column."""
    given = {
        "img_size": 32,
        "num_point_w": 2,
        "num_point_h": 2,
        "downsample_ratio": 2,
        "depth": 3,
        "num_iters": 2,
    }
    body = fields_of("yuexy/PS-ViT", "PSViT", **given, embed_dim=16, num_heads=2)["model"].plain()
    np.testing.assert_array_equal(body.official_points(), [[[4, 4], [12, 4], [4, 12], [12, 12]]])


def test_t2t_convolution_tokens():
    given = {**SMALL, "img_size": 32, "tokens_type": "convolution", "token_dim": 4}
    given.pop("patch_size")
    repository, cls = "yitu-opensource/T2T-ViT", "T2T_ViT"
    tensors = tensors_of(repository, cls, given)
    model, variables = weights.import_reference(repository, cls, given, tensors)
    image = np.random.default_rng(1).normal(size=(32, 32, 3)).astype(np.float32)
    x = image
    for name, stride, padding in (("soft_split0", 4, 2), ("soft_split1", 2, 1), ("project", 2, 1)):
        weight, bias = (tensors[f"tokens_to_token.{name}.{leaf}"] for leaf in ("weight", "bias"))
        x = convolved(x, weight, bias, stride, padding)
    expected = x.reshape(4, 16) + tensors["pos_embed"][0, 1:]
    out = jax.jit(lambda v, x: model.apply(v, x, record=("embed",)))(variables, image[None])
    np.testing.assert_allclose(out.records["embed"][0, 1:], expected, rtol=1e-4, atol=1e-4)


def test_dvt_passes_its_keywords_to_every_exit():
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5, "drop_path_rate": 0.1}
    repository = "blackfeather-wang/Dynamic-Vision-Transformer"
    assert fields_of(repository, "DVT_Deit_small_model", **small, drop_rate=0.2)["dropout"] == 0.2
    with pytest.raises(weights.WeightsError, match=r"img_size=384\).*written for that"):
        official.build(repository, "DVT_T2t_vit_12_model", {**small, "img_size": 384})


def test_every_argument_is_read_or_says_why_not():
    """Each row of the table names its arguments once; values it lacks are refused in one line with a reason."""
    for row, entry in official.OFFICIAL.items():
        for name, argument in entry.arguments.items():
            argument.convert(argument.default)  # its own default is always read
            with pytest.raises(weights.WeightsError, match="no constructor argument") as error:
                entry.build(row, {f"{name}_": 1})
            assert "\n" not in str(error.value)
