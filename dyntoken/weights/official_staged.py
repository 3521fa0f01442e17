"""Official classes with stages, argument by argument; see `official_isotropic`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dyntoken.registry import suggest
from dyntoken.weights import constructors as common
from dyntoken.weights.constructors import Argument, Official, Values, flag, only, per_stage, to, unused

# PVT, CvT

PVT = {
    **common.IMAGES,
    **common.USUAL,
    "patch_size": to("patch_size", int, 16),
    "embed_dims": to("widths", common.ints, (64, 128, 256, 512)),
    "depths": to("depths", common.ints, (3, 4, 6, 3)),
    "num_heads": to("heads", common.ints, (1, 2, 4, 8)),
    "mlp_ratios": to("mlp_ratios", per_stage(float), (4, 4, 4, 4)),
    "sr_ratios": to("sr_ratios", common.ints, (8, 4, 2, 1)),
    "qkv_bias": to("qkv_bias", flag, False),
    "num_stages": Argument(4, int),
    "norm_layer_eps": Argument(None, common.optional(float)),  # short for norm_layer="LayerNorm(eps=...)"
}


def _pvt(a: Values) -> dict[str, Any]:
    count, widths = a["num_stages"], a["embed_dims"]
    if len(widths) < max(4, count) or widths[3] != widths[count - 1]:
        raise ValueError(
            f"num_stages={count}, embed_dims={widths}: its class token and last norm are as wide as the fourth stage"
        )
    names = {"embed_dims": "widths", "depths": "depths", "num_heads": "heads"}
    names |= {"mlp_ratios": "mlp_ratios", "sr_ratios": "sr_ratios"}
    found = {field: a[name][:count] for name, field in names.items()}
    return found if a["norm_layer_eps"] is None else {**found, "norm_eps": a["norm_layer_eps"]}


CVT = {
    **common.IMAGES,  # the class takes images of any size; ours is built for one
    **common.NORM,
    "act_layer": to(
        "activation", common.ACTIVATION["act_layer"].convert, "QuickGELU"
    ),  # as its own builder sets it
    "spec": Argument(None),
    **unused(init="trunc_norm"),  # fresh parameters only
}
# Entries of its spec, one value per stage -> our field.
CVT_SPEC = {
    "PATCH_SIZE": "patch_sizes",
    "PATCH_STRIDE": "patch_strides",
    "PATCH_PADDING": "patch_paddings",
    "DIM_EMBED": "widths",
    "NUM_HEADS": "heads",
    "DEPTH": "depths",
    "MLP_RATIO": "mlp_ratios",
    "DROP_RATE": "dropout",
    "ATTN_DROP_RATE": "attn_dropout",
    "DROP_PATH_RATE": "drop_path",
    "QKV_BIAS": "qkv_bias",
    "QKV_PROJ_METHOD": "projection",
    "CLS_TOKEN": "class_tokens",
    "KERNEL_QKV": "kernels",
    "STRIDE_KV": "kv_strides",
    "PADDING_KV": "kv_paddings",
}
CVT_NEEDED = ("NUM_STAGES", *CVT_SPEC, "STRIDE_Q", "PADDING_Q")
CVT_UNREAD = ("INIT", "POS_EMBED")  # the first is about fresh parameters only, the second is never read


def _cvt(a: Values) -> dict[str, Any]:
    spec = a["spec"]
    if not spec:
        raise ValueError("it needs its spec: the MODEL.SPEC of its yaml files")
    known = (*CVT_NEEDED, *CVT_UNREAD)
    for name in spec:
        if name not in known:
            raise ValueError(f"the spec has no entry {name!r}: {suggest(name, known)}")
    if missing := [name for name in CVT_NEEDED if name not in spec]:
        raise ValueError(f"the spec lacks {', '.join(missing)}")
    stages = range(int(spec["NUM_STAGES"]))
    fields = {field: tuple(spec[name][stage] for stage in stages) for name, field in CVT_SPEC.items()}
    for stage in stages:
        moved = spec["STRIDE_Q"][stage] != 1 or spec["KERNEL_QKV"][stage] != 2 * spec["PADDING_Q"][stage] + 1
        if moved and fields["projection"][stage] == "dw_bn":  # the others leave queries as they are
            raise ValueError(
                f"KERNEL_QKV={spec['KERNEL_QKV']} with PADDING_Q={spec['PADDING_Q']} and STRIDE_Q="
                f"{spec['STRIDE_Q']} changes the size of the queries' map, so that no residual can be added"
            )
    return {**fields, "pool": "token" if fields["class_tokens"][-1] else "mean"}


# Swin

SHARED_SWIN = {
    **common.IMAGES,
    **common.ATTN_DROPOUT,
    **common.NORM,
    "patch_size": to("patch_size", per_stage(int), 4),
    "depths": to("depths", common.ints, (2, 2, 6, 2)),
    "num_heads": to("heads", common.ints, (3, 6, 12, 24)),
    "qkv_bias": to("qkv_bias", flag, True),
    "drop_path_rate": to("drop_path", float, 0.1),
}
SWIN = {
    **SHARED_SWIN,
    **common.DROPOUT,
    **common.QK_SCALE,
    "embed_dim": to("width", int, 96),
    "window_size": to("window", int, 7),
    "mlp_ratio": to("mlp_ratio", float, 4.0),
    "ape": to("position", flag, False),
    "patch_norm": to("patch_norm", flag, True),
    "use_checkpoint": to("remat", flag, False),
}


def _windows(value: Any) -> int | tuple[int, ...]:
    """Sides of square windows, one or one per stage; two common.ints are (height, width) of all."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return _side(value)
    return per_stage(_side)(value) if isinstance(value, (list, tuple)) else int(value)


def _side(value: int | Sequence[int]) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError("only square windows are implemented")
    return int(sides.pop())


TIMM_SWIN = {
    **SHARED_SWIN,
    **common.HEAD_DROPOUT,
    "embed_dim": to("width", per_stage(int), 96),
    "window_size": to("window", _windows, 7),
    "mlp_ratio": to("mlp_ratio", per_stage(float), 4.0),
    "head_dim": to("head_dim", common.optional(per_stage(int)), None),
    "always_partition": to("always_partition", flag, False),
    "proj_drop_rate": to("dropout", float, 0.0),
    "global_pool": only("avg", "max", "avgmax", "catavgmax", why="'' gives no logits per image"),
    "embed_layer": only(None, "PatchEmbed", why=common.CODE),
    # Fresh parameters; other sizes than img_size.
    **unused(strict_img_size=True, dynamic_img_size=False, weight_init="", device=None, dtype=None),
}


def _timm_swin(a: Values) -> dict[str, Any]:
    whole, patch = a["img_size"], a["patch_size"]
    high, wide = (whole, whole) if isinstance(whole, int) else whole
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    windows = (
        a["window_size"] if isinstance(a["window_size"], tuple) else (a["window_size"],) * len(a["depths"])
    )
    for stage, window in enumerate(windows):
        grid = (high // rows >> stage, wide // columns >> stage)
        if grid[0] != grid[1] and min(grid) <= window and not a["always_partition"]:
            raise ValueError(
                f"img_size={whole}: a window of {grid} that is no square, or moves along one axis only"
            )
    pool = a["global_pool"]
    return {"pos_dropout": 0.0, **({} if pool == "avg" else {"pool": pool})}


# ConvNeXt

SHARED_CONVNEXT = {
    **common.IMAGES,  # the classes take images of any size; ours is built for one
    **common.DROP_PATH,
    "depths": to("depths", common.ints, (3, 3, 9, 3)),
    "dims": to("widths", common.ints, (96, 192, 384, 768)),
    **unused(head_init_scale=1.0),  # fresh parameters only
}
CONVNEXT = {
    **SHARED_CONVNEXT,
    "layer_scale_init_value": to("layer_scale", lambda v: float(v) if float(v) > 0 else None, 1e-6),
}
TIMM_CONVNEXT = {
    **SHARED_CONVNEXT,
    **common.HEAD_DROPOUT,
    **common.ACTIVATION,
    "patch_size": to("patch_size", int, 4),
    "ls_init_value": to("layer_scale", common.optional(float), 1e-6),
    "norm_eps": to("norm_eps", common.optional(float, 1e-6), None),
    "kernel_sizes": to("kernel", per_stage(int), 7),
    "stem_type": to("stem", str, "patch"),
    "conv_bias": to("conv_bias", flag, True),
    "use_grn": to("grn", flag, False),
    "head_hidden_size": to("representation_size", common.optional(int), None),
    "global_pool": only("avg", "max", "avgmax", "catavgmax", why="'' gives no logits per image"),
    "head_norm_first": Argument(False, flag),
    "output_stride": only(
        32, why="a finer last grid takes dilated convolutions, which no published classifier has"
    ),
    "norm_layer": only(None, "layernorm", "layernorm2d", why=common.CODE),
    **unused(conv_mlp=False, device=None, dtype=None),  # the same products, as 1x1 convolutions
}


def _timm_convnext(a: Values) -> dict[str, Any]:
    pool, stem = a["global_pool"], a["stem_type"]
    if stem == "patch" and (a["patch_size"] == 2 or a["patch_size"] > 7):
        raise ValueError(
            f"patch_size={a['patch_size']}: with 2 the first stage downsamples, from 8 on the last one does not "
            "(its convolutions are dilated instead), which is not implemented"
        )
    if pool == "catavgmax" and not a["head_norm_first"]:
        raise ValueError(
            "global_pool='catavgmax' needs head_norm_first=True: the norm is as wide as the cells"
        )
    if a["head_norm_first"]:
        if a["head_hidden_size"]:
            raise ValueError("head_norm_first=True goes without head_hidden_size")
        pooling = {"pool": "mean" if pool == "avg" else pool}
    else:
        pooling = {"pooled": "mean" if pool == "avg" else pool}
    patch = {} if stem == "patch" else {"patch_size": 4}  # it is not read then
    return {**pooling, **patch, "representation_act": "gelu"}


SWIN_T = "swin_tiny_patch4_window7_224"
CLASSES = {
    "pvt/PyramidVisionTransformer": Official("pvt_small", PVT, _pvt),
    "cvt/ConvolutionalVisionTransformer": Official("cvt_13", CVT, _cvt),
    # fused_window_process is a faster way to the same numbers.
    "swin/SwinTransformer": Official(SWIN_T, {**SWIN, **unused(fused_window_process=False)}),
    "timm/SwinTransformer": Official(SWIN_T, TIMM_SWIN, _timm_swin),
    "dynamicvit/SwinTransformer_Teacher": Official(SWIN_T, SWIN),
    "dynamicvit/AdaSwinTransformer": Official(
        SWIN_T, {**SWIN, **unused(pruning_loc=(4, 8, 12), sparse_ratio=(0.9, 0.7, 0.5))}, common.pruned
    ),
    "convnext/ConvNeXt": Official("convnext_tiny", CONVNEXT),
    "timm/ConvNeXt": Official("convnext_tiny", TIMM_CONVNEXT, _timm_convnext),
    "dynamicvit/ConvNeXt": Official("convnext_tiny", CONVNEXT),
    "dynamicvit/ConvNeXt_Teacher": Official("convnext_tiny", CONVNEXT),
    "dynamicvit/AdaConvNeXt": Official(
        "convnext_tiny",
        {**CONVNEXT, **unused(pruning_loc=(1, 2, 3), sparse_ratio=(0.75, 0.5, 0.25))},
        common.pruned,
    ),
}
