"""Constructor arguments of the official classes with stages: built, or refused with a reason."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dyntoken import weights
from dyntoken.backbones import convnext, cvt
from dyntoken.weights import official
from tests.faults.references import ACTIVATIONS, SWIN, convolved, fields_of, filled, tensors_of


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
    ("size", "kernel", "stride", "padding"), [(4, 3, 2, 1), (5, 3, 2, 1), (4, 3, 1, 1), (5, 2, 2, 0)]
)
def test_average_pooling_counts_padding_and_no_overhang(size, kernel, stride, padding):
    cells = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    padded = np.pad(cells, padding)
    starts = [i for i in range(0, size + padding, stride) if i < size + 2 * padding - kernel + stride]
    expected = [[padded[i : i + kernel, j : j + kernel].mean() for j in starts] for i in starts]
    found = cvt.average_pool(cells[None, :, :, None], kernel, stride, padding)[0, :, :, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


CVT_SPEC = {
    "NUM_STAGES": 1,
    "PATCH_SIZE": [7],
    "PATCH_STRIDE": [4],
    "PATCH_PADDING": [2],
    "DIM_EMBED": [8],
    "NUM_HEADS": [2],
    "DEPTH": [1],
    "MLP_RATIO": [2.0],
    "DROP_RATE": [0.0],
    "ATTN_DROP_RATE": [0.0],
    "DROP_PATH_RATE": [0.0],
    "QKV_BIAS": [True],
    "QKV_PROJ_METHOD": ["linear"],
    "CLS_TOKEN": [True],
    "KERNEL_QKV": [1],
    "STRIDE_KV": [1],
    "PADDING_KV": [0],
    "STRIDE_Q": [1],
    "PADDING_Q": [0],
}


def test_cvt_projections_without_a_convolution():
    """Pooling single cells is no projection at all; keys pooled by two are fewer."""
    repository, cls = "microsoft/CvT", "ConvolutionalVisionTransformer"
    given = {"img_size": 16, "num_classes": 5, "spec": CVT_SPEC}
    tensors = tensors_of(repository, cls, given)
    assert not any("conv_proj" in key for key in tensors)
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)

    def logits(**spec):
        constructor = {**given, "spec": {**CVT_SPEC, **spec}}
        model, variables = weights.import_reference(repository, cls, constructor, tensors)
        return np.asarray(jax.jit(lambda v, x: model.apply(v, x).logits)(variables, images))

    linear = logits()
    np.testing.assert_allclose(logits(QKV_PROJ_METHOD=["avg"]), linear, rtol=1e-5, atol=1e-5)
    pooled = {"KERNEL_QKV": [3], "STRIDE_KV": [2], "PADDING_KV": [1], "PADDING_Q": [1]}
    assert np.abs(logits(QKV_PROJ_METHOD=["avg"], **pooled) - linear).max() > 1e-3
    with pytest.raises(weights.WeightsError, match="so that no residual can be added"):
        logits(QKV_PROJ_METHOD=["dw_bn"], STRIDE_Q=[2])


def test_pvt_of_three_stages():
    given = {
        **{"img_size": 32, "patch_size": 4, "num_classes": 5, "num_stages": 3, "depths": (1,) * 4},
        **{"embed_dims": (8, 8, 16, 16), "num_heads": (1,) * 4, "sr_ratios": (2, 2, 1, 1)},
    }
    tensors = tensors_of("whai362/PVT", "PyramidVisionTransformer", given)
    assert tensors["pos_embed3"].shape == (1, 1 + 4, 16) and "pos_embed4" not in tensors
    with pytest.raises(weights.WeightsError, match="as wide as the fourth stage"):
        official.build("whai362/PVT", "PyramidVisionTransformer", {**given, "embed_dims": (8, 8, 8, 16)})


CONVNEXT = {"img_size": 32, "depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "num_classes": 5}


def convnext_out(tensors, **given):
    model, variables = weights.import_reference("timm", "ConvNeXt", {**CONVNEXT, **given}, tensors)
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    run = jax.jit(lambda v, x: model.apply(v, x, record=("features", "embed", "blocks")))
    return images, run(variables, images)


def timm_keys(tensors):
    """timm's spelling of its ConvNeXt's keys, with 1x1 convolutions in the MLPs."""
    found = {}
    for key, value in tensors.items():
        parts = key.split(".")
        if parts[0] == "stages":
            name = ".".join(parts[3:]).replace("dwconv", "conv_dw")
            name = name.replace("pwconv", "mlp.fc").replace("grn", "mlp.grn")
            key = f"stages.{parts[1]}.blocks.{parts[2]}.{name}"
            value = value[:, :, None, None] if "mlp.fc" in name and value.ndim == 2 else value
        found[key] = value
    return found


def test_convnext_stem_of_two_convolutions():
    for stem, numbers in (("overlap_act", "023"), ("overlap", "012")):
        given = {"stem_type": stem, "act_layer": "relu"}
        tensors = tensors_of("timm", "ConvNeXt", {**CONVNEXT, **given})
        names = dict(zip(("0", "conv2", "1"), numbers, strict=True))
        stems = {
            f"stem.{names[key.split('.')[2]]}.{key.rpartition('.')[2]}": value
            for key, value in tensors.items()
            if key.startswith("downsample_layers.0.")
        }
        rest = {k: v for k, v in tensors.items() if not k.startswith("downsample_layers.0.")}
        images, out = convnext_out({**rest, **stems}, **given)
        first, second, last = ([stems[f"stem.{n}.{leaf}"] for leaf in ("weight", "bias")] for n in numbers)
        x = convolved(images[0], *first, 2, 1)
        x = convolved(np.maximum(x, 0) if stem == "overlap_act" else x, *second, 2, 1)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * last[0] + last[1]
        np.testing.assert_allclose(out.records["embed"][0], x.reshape(-1, 8), rtol=1e-4, atol=1e-4)


def test_convnext_heads_and_global_response_norm():
    given = {"use_grn": True, "ls_init_value": None, "conv_mlp": True, "kernel_sizes": (3, 5, 7, 3)}
    tensors = tensors_of("timm", "ConvNeXt", {**CONVNEXT, **given})
    assert tensors["stages.1.0.dwconv.weight"].shape == (8, 1, 5, 5)
    tensors = timm_keys(tensors)
    classify = (tensors["head.weight"], tensors["head.bias"])

    def norm(x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * tensors["norm.weight"] + tensors["norm.bias"]

    pools = {
        "avg": lambda x: x.mean(1),
        "max": lambda x: x.max(1),
        "avgmax": lambda x: (x.mean(1) + x.max(1)) / 2,
        "catavgmax": lambda x: np.concatenate([x.mean(1), x.max(1)], axis=-1),
    }
    for first, pool in ((False, "max"), (True, "max"), (False, "avgmax"), (True, "catavgmax")):
        wide = {"head.weight": np.tile(classify[0], (1, 2))} if pool == "catavgmax" else {}
        more = {**given, "head_norm_first": first, "global_pool": pool}
        _, out = convnext_out({**tensors, **wide}, **more)
        cells = np.asarray(out.records["blocks"][-1])
        pooled = pools[pool](norm(cells)) if first else norm(pools[pool](cells))
        expected = pooled @ wide.get("head.weight", classify[0]).T + classify[1]
        np.testing.assert_allclose(out.logits, expected, rtol=1e-4, atol=1e-4)
    x = np.random.default_rng(3).normal(size=(2, 9, 4)).astype(np.float32)
    module = convnext.GlobalResponseNorm()
    variables = filled(module, x)
    length = np.sqrt((x**2).sum(1, keepdims=True))
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    expected = x + scale * x * length / length.mean(-1, keepdims=True) + bias
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_convnext_hidden_layer_of_the_head():
    tensors = tensors_of("timm", "ConvNeXt", {**CONVNEXT, "head_hidden_size": 6, "conv_bias": False})
    assert not any(key.endswith("bias") and "conv" in key and "pwconv" not in key for key in tensors)
    _, out = convnext_out(tensors, head_hidden_size=6, conv_bias=False, drop_rate=0.3)
    hidden = (
        np.asarray(out.tokens.x[:, 0]) @ tensors["pre_logits.fc.weight"].T + tensors["pre_logits.fc.bias"]
    )
    expected = ACTIVATIONS["gelu"](hidden) @ tensors["head.weight"].T + tensors["head.bias"]
    np.testing.assert_allclose(out.logits, expected, rtol=1e-4, atol=1e-4)


def test_swin_windows_widths_and_pools():
    given = {
        **SWIN,
        "window_size": ((4, 4), (2, 2)),
        "embed_dim": (8, 12),
        "mlp_ratio": (2, 3.0),
        "head_dim": (8, 4),
    }
    tensors = tensors_of("timm", "SwinTransformer", {**given, "global_pool": "max"})
    assert tensors["layers.1.blocks.0.attn.relative_position_bias_table"].shape == (9, 2)
    assert tensors["layers.1.blocks.0.mlp.fc1.weight"].shape == (36, 12)
    assert tensors["layers.0.blocks.0.attn.qkv.weight"].shape == (24, 8)
    model, variables = weights.import_reference(
        "timm", "SwinTransformer", {**given, "global_pool": "max"}, tensors
    )
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    out = jax.jit(lambda v, x: model.apply(v, x, record=("features",)))(variables, images)
    expected = np.asarray(out.tokens.patches).max(1) @ tensors["head.weight"].T + tensors["head.bias"]
    np.testing.assert_allclose(out.logits, expected, rtol=1e-4, atol=1e-4)
    shifts = fields_of("timm", "SwinTransformer", **{**SWIN, "depths": (1, 2)}, always_partition=True)
    assert shifts["model"].plain().shift_of(1, 1) == 2  # though one window is the grid
    for wrong, match in (({"window_size": (4, 2)}, "square"), ({"img_size": (16, 32)}, "no square")):
        with pytest.raises(weights.WeightsError, match=match):
            official.build("timm", "SwinTransformer", {**SWIN, **wrong})
