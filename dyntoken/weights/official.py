"""The official model classes, argument by argument, and what each is in this library.

A row of `OFFICIAL` says of every constructor argument which of our fields it becomes, which
values alone are implemented and why, or that it changes nothing; any other argument is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dyntoken.registry import suggest
from dyntoken.weights.constructors import (
    Argument,
    Official,
    Reference,
    Values,
    called,
    epsilon,
    flag,
    ints,
    only,
    optional,
    positive,
    size,
    to,
    unused,
    with_defaults,
)
from dyntoken.weights.errors import WeightsError

CODE = "another one is code, which no table reads"
ACTIVATIONS = {
    "gelu": "gelu",
    "gelutanh": "gelu_tanh",
    "quickgelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


def activation(value: Any) -> str:
    """`act_layer`: timm's name or a class's, "nn.SiLU"."""
    name = str(value or "gelu").rsplit(".", 1)[-1].lower().replace("_", "")
    if name not in ACTIVATIONS:
        raise ValueError(f"only {', '.join(map(repr, ACTIVATIONS.values()))} are implemented")
    return ACTIVATIONS[name]


IMAGES = {
    "img_size": to("img_size", size, 224),
    "in_chans": to("in_chans", int, 3),
    "num_classes": to("num_classes", int, 1000),
}
BLOCKS = {
    "embed_dim": to("width", int, 768),
    "depth": to("depth", int, 12),
    "num_heads": to("heads", int, 12),
    "mlp_ratio": to("mlp_ratio", float, 4.0),
    "qkv_bias": to("qkv_bias", flag, False),
}
DROP_PATH = {"drop_path_rate": to("drop_path", float, 0.0)}
DROPOUT = {"drop_rate": to("dropout", float, 0.0)}
ATTN_DROPOUT = {"attn_drop_rate": to("attn_dropout", float, 0.0)}
QK_SCALE = {"qk_scale": to("qk_scale", positive, None)}
NORM_5 = {"norm_layer": to("norm_eps", epsilon(1e-5), None)}
NORM_6 = {"norm_layer": to("norm_eps", epsilon(1e-6), None)}
ACTIVATION = {"act_layer": to("activation", activation, None)}
HYBRID = {"hybrid_backbone": only(None, why="a convolutional network ahead of the patches is code")}
REPRESENTATION = {"representation_size": to("representation_size", lambda v: int(v) if v else None, None)}
VIT = {**IMAGES, "patch_size": to("patch_size", size, 16), **BLOCKS, **DROP_PATH}


def pruned(at: Sequence[int] | None, ratios: Sequence[float] | None) -> dict[str, Any]:
    """DynamicViT's and TPS's sites; both take the ratios in the order of the blocks."""
    if not at or not ratios:
        raise ValueError("pruning_loc and its ratios are needed")
    if len(ratios) < len(set(at)):
        raise ValueError(f"{len(ratios)} keep ratios for {len(set(at))} prune locations")
    at = tuple(sorted({int(index) for index in at}))
    return {"at": at, "keep": tuple(float(ratio) for ratio in ratios[: len(at)])}


def _dynamicvit(a: Values) -> dict[str, Any]:
    ratios = a["token_ratio"] if "token_ratio" in a else a["sparse_ratio"]
    return {"method": "dynamicvit", **pruned(a["pruning_loc"], ratios)}


PRUNING = {"pruning_loc": Argument(None), "token_ratio": Argument(None)}


# timm, DeiT

TIMM_VIT = {
    **with_defaults(VIT, qkv_bias=True),
    **NORM_6,
    **ATTN_DROPOUT,
    "proj_drop_rate": to("dropout", float, 0.0),
    "pos_drop_rate": to("pos_dropout", float, 0.0),
    "qk_norm": to("qk_norm", flag, False),
    "proj_bias": to("proj_bias", flag, True),
    "pre_norm": to("pre_norm", flag, False),
    "class_token": to("class_token", flag, True),
    "reg_tokens": to("registers", lambda v: int(v or 0), 0),
    "no_embed_class": to("no_embed_class", flag, False),
    "init_values": to("layer_scale", optional(float), None),
    "pos_embed": only("learn", "none", "", why="timm has no others"),
    "global_pool": only("token", "avg", why="other poolings"),
    "fc_norm": Argument(None, optional(flag)),
    "final_norm": Argument(True, flag),
    "pool_include_prefix": Argument(False, flag),
    "act_layer": Argument(None, activation),
    "mlp_layer": only(None, "Mlp", "SwiGLUPacked", why=CODE),
    "embed_layer": only(None, "PatchEmbed", why=CODE),
    "embed_norm_layer": only(None, why=CODE),
    "block_fn": only(None, "Block", why=CODE),
    "attn_layer": only(None, "Attention", why=CODE),
    "scale_attn_norm": only(False, why="no published model has it"),
    "scale_mlp_norm": only(False, why="no published model has it"),
    "patch_drop_rate": only(0, why="a reduction method with random scores drops patches"),
    "drop_rate": only(0, why="there is no dropout before the classifier"),
    # Fresh parameters only; and images of other sizes than img_size, for which ours is built.
    **unused(weight_init="", fix_init=False, dynamic_img_size=False, dynamic_img_pad=False),
}


def _timm_vit(a: Values) -> dict[str, Any]:
    mean = a["global_pool"] == "avg"
    if not mean and not a["class_token"]:
        raise ValueError("global_pool='token' needs class_token=True")
    packed = a["mlp_layer"] == "SwiGLUPacked"
    if packed and a["act_layer"] != "silu":
        raise ValueError("mlp_layer='SwiGLUPacked' needs act_layer='silu'")
    # The norm comes after pooling where it pools patches, unless told otherwise.
    after = mean if a["fc_norm"] is None else a["fc_norm"]
    return {
        "pool": ("all" if a["pool_include_prefix"] else "mean") if mean else "token",
        "position": a["pos_embed"] == "learn",
        "final_norm": a["final_norm"] and not after,
        "fc_norm": a["final_norm"] and after,
        "activation": "swiglu" if packed else a["act_layer"],
    }


def _timm_vit_distilled(a: Values) -> dict[str, Any]:
    if a["no_embed_class"]:
        raise ValueError("no_embed_class=True leaves no room for its prefix rows, which it always embeds")
    return {**_timm_vit(a), "distilled": True}


# DynamicViT, TPS, EViT

DYNAMICVIT = {
    **with_defaults(VIT, qkv_bias=True),
    **DROPOUT,
    **QK_SCALE,
    **NORM_6,
    **REPRESENTATION,
    **HYBRID,
    **unused(attn_drop_rate=0.0),  # its attention never applies it
}
TPS = {
    **VIT,
    **QK_SCALE,
    **NORM_5,
    **ACTIVATION,
    "no_embed_class": to("no_embed_class", flag, True),
    "prune_loc": Argument((3, 6, 9)),
    "keep_ratio": Argument(0.7),
    "token_merge_module": Argument(None, lambda value: tps_options(value)),
    "block_layers": only("Block", why="its other one loses the residual"),
    "Patch_layer": only("PatchEmbed", why=CODE),
    "Attention_block": only("Attention", why=CODE),
    "Mlp_block": only("Mlp", why=CODE),
    "token_score_head_cls": only("PredictorLG", why="there is no other in its file"),
    "shuffle_score": only(False, 0, why="its own code fails with it"),
    "drop_rate": only(0, why="there is no dropout before the classifier"),
    # Stored and never read, or about memory alone.
    **unused(attn_drop_rate=0.0, global_pool=None, dpr_constant=True, init_scale=1e-4, momentum=0.9),
    **unused(prune_th_init=1.0, grad_checkpoint_layers=(0, 1, 2), reuse_last_attn=False),
}


def _tps(a: Values) -> dict[str, Any]:
    found: dict[str, Any] = {"drop_path_rule": "constant"}
    at, ratio, merge = a["prune_loc"], a["keep_ratio"], a["token_merge_module"]
    if not at:
        return found
    powers = isinstance(ratio, (int, float))
    ratios = [float(ratio) ** (k + 1) for k in range(len(set(at)))] if powers else list(ratio)
    return {
        **found,
        **pruned(at, ratios),
        **(merge or {}),
        "method": "dynamicvit" if merge is None else "dtps",
    }


def tps_options(module: Any) -> dict[str, Any] | None:
    """`TPSModule` as options of dTPS: text, or a mapping of its arguments; None for no module."""
    if module is None:
        return None
    given = {"l2_norm": True, "temperature": 1, **called(module, "TPSModule")}
    if unknown := given.keys() - {"l2_norm", "temperature"}:
        raise ValueError(f"TPSModule has no argument {min(unknown)!r}")
    similarity = "cosine" if flag(given["l2_norm"]) else "dot"
    return {"temperature": float(given["temperature"]), "similarity": similarity}


EVIT = {
    **with_defaults(VIT, qkv_bias=True),
    **DROPOUT,
    **ATTN_DROPOUT,
    **NORM_6,
    **ACTIVATION,
    **REPRESENTATION,
    "distilled": to("distilled", flag, False),
    "keep_rate": Argument((1,)),
    "fuse_token": Argument(False, flag),
    "embed_layer": only("PatchEmbed", None, why=CODE),
    **unused(weight_init=""),
}


def _evit(a: Values) -> dict[str, Any]:
    """Blocks whose `keep_rate` is below 1 are the sites."""
    found = {"representation_size": None} if a["distilled"] else {}
    keep = {i: rate for i, rate in enumerate(per_block(a["keep_rate"], a["depth"])) if rate < 1}
    if not keep:
        return found
    if a["distilled"]:
        raise ValueError(
            "distilled=True with keep_rate < 1 ranks its distillation token among the patches and "
            "returns one sample only; import it with keep_rate=(1,)"
        )
    method = "evit" if a["fuse_token"] else "topk"
    return {**found, "at": tuple(keep), "keep": tuple(keep.values()), "method": method}


def _etps(a: Values) -> dict[str, Any]:
    """EViT's selection with TPS's squeezing in place of the fused token."""
    found = _evit(a)
    return {**found, "method": "etps"} if "method" in found else found


def per_block(rates: Any, depth: int) -> tuple[float, ...]:
    """EViT's `keep_rate` argument as one rate per block."""
    rates = tuple(rates) if isinstance(rates, (list, tuple)) else (rates,)
    rates = rates * depth if len(rates) == 1 else rates
    if len(rates) != depth or not all(0 < rate <= 1 and math.isfinite(rate) for rate in rates):
        raise WeightsError(f"keep_rate={rates}: give one rate in (0, 1] per block ({depth}), or a single one")
    return rates


# LV-ViT, T2T-ViT, PS-ViT

LVVIT = {
    **VIT,
    **DROPOUT,
    **ATTN_DROPOUT,
    **QK_SCALE,
    **NORM_5,
    **HYBRID,
    "skip_lam": to("skip_lam", float, 1.0),
    "drop_path_decay": only("linear", "fix", why="other decays"),
    "p_emb": Argument("4_2"),
    "head_dim": only(None, why="other widths of heads"),
    "order": Argument(None),
    "mix_token": Argument(False, flag),
    "return_dense": Argument(False, flag),
}
# p_emb -> (stem, its channels); the official classes take any other value for plain patches.
STEMS = {"4_2": ("conv", 64), "4_2_128": ("conv", 128)}


def _lvvit(a: Values, aux_weight: float = 0.5) -> dict[str, Any]:
    order = a["order"]
    if order is not None and set(order) != {"tr"}:
        raise ValueError(f"order={order!r}: only 'tr' blocks are implemented")
    stem, channels = STEMS.get(a["p_emb"], ("patch", 64))
    if a["mix_token"] and not a["return_dense"]:
        raise ValueError("mix_token=True needs return_dense=True")
    return {
        "depth": a["depth"] if order is None else len(order),  # order goes before depth
        "drop_path_rule": {"linear": "linear", "fix": "constant"}[a["drop_path_decay"]],
        "stem": stem,
        "stem_width": channels,
        "aux_weight": aux_weight if a["return_dense"] else None,
        "mix_token": a["mix_token"],
    }


def _lvvit_of_dynamicvit(a: Values, aux_weight: float = 0.5) -> dict[str, Any]:
    if not a["return_dense"]:
        raise ValueError("it always calls its auxiliary head: import it with return_dense=True")
    return {**_lvvit(a, aux_weight), "mix_token": False}  # never read


T2T = {
    **IMAGES,
    **BLOCKS,
    **DROP_PATH,
    **DROPOUT,
    **ATTN_DROPOUT,
    **QK_SCALE,
    **NORM_5,
    "token_dim": to("token_dim", int, 64),
    "tokens_type": to(
        "tokens_type", only("performer", "transformer", why="other tokens").convert, "performer"
    ),
}
PSVIT = {
    **IMAGES,
    **with_defaults(BLOCKS, embed_dim=384, depth=14),
    **DROP_PATH,
    **DROPOUT,
    **ATTN_DROPOUT,
    **QK_SCALE,
    **NORM_5,
    "num_iters": to("iterations", int, 4),
    "offset_gamma": to("gamma", float, 0.1),
    "offset_bias": to("offset_bias", flag, False),
    "with_cls_token": to("class_token", flag, False),
    "num_point_w": Argument(14, int),
    "num_point_h": Argument(14, int),
    "downsample_ratio": only(4, why="that is what its stem does"),
    "stem_layer": only(None, why="a stem is code: give its channels as stem=(64, 64, 256, 64)"),
    # In place of stem_layer: channels of the first convolution, inside and after the first
    # bottleneck, inside the second (the builders use 64, 64, 256, 64; in Ti 64, 64, 192, 64).
    "stem": Argument(None, optional(ints)),
}


def _psvit(a: Values) -> dict[str, Any]:
    depth = a["depth"] - a["num_iters"]
    if depth < 1:
        raise ValueError(f"depth={a['depth']} leaves no block after {a['num_iters']} iterations")
    return {
        "depth": depth,
        "points": (a["num_point_h"], a["num_point_w"]),
        "stem_channels": a["stem"] or (64, 64, a["embed_dim"], 64),
        "pool": "token" if a["with_cls_token"] else "mean",
    }


# PVT, CvT

PVT = {
    **IMAGES,
    **DROP_PATH,
    **DROPOUT,
    **ATTN_DROPOUT,
    **QK_SCALE,
    **NORM_5,
    "patch_size": to("patch_size", int, 16),
    "embed_dims": to("widths", ints, (64, 128, 256, 512)),
    "depths": to("depths", ints, (3, 4, 6, 3)),
    "num_heads": to("heads", ints, (1, 2, 4, 8)),
    "mlp_ratios": to("mlp_ratios", lambda v: tuple(map(float, v)), (4, 4, 4, 4)),
    "sr_ratios": to("sr_ratios", ints, (8, 4, 2, 1)),
    "qkv_bias": to("qkv_bias", flag, False),
    "num_stages": only(4, why="its last norm is that of a fourth stage"),
    "norm_layer_eps": Argument(None, optional(float)),  # short for norm_layer="LayerNorm(eps=...)"
}


def _pvt(a: Values) -> dict[str, Any]:
    return {} if a["norm_layer_eps"] is None else {"norm_eps": a["norm_layer_eps"]}


CVT = {
    **IMAGES,  # the class takes images of any size; ours is built for one
    **NORM_5,
    "act_layer": only("QuickGELU", None, why="its own builder sets it"),
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
    "CLS_TOKEN": "class_tokens",
    "KERNEL_QKV": "kernels",
    "STRIDE_KV": "kv_strides",
    "PADDING_KV": "kv_paddings",
}
CVT_NEEDED = ("NUM_STAGES", *CVT_SPEC, "QKV_PROJ_METHOD", "STRIDE_Q", "PADDING_Q")
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
        if spec["QKV_PROJ_METHOD"][stage] != "dw_bn":
            raise ValueError(f"QKV_PROJ_METHOD={spec['QKV_PROJ_METHOD']}: only 'dw_bn' is implemented")
        if spec["STRIDE_Q"][stage] != 1 or spec["KERNEL_QKV"][stage] != 2 * spec["PADDING_Q"][stage] + 1:
            raise ValueError(
                f"KERNEL_QKV={spec['KERNEL_QKV']} with PADDING_Q={spec['PADDING_Q']} and STRIDE_Q="
                f"{spec['STRIDE_Q']} changes the size of the queries' map, so that no residual can be added"
            )
    return {**fields, "pool": "token" if fields["class_tokens"][-1] else "mean"}


# Swin, ConvNeXt

SWIN = {
    **IMAGES,
    **ATTN_DROPOUT,
    **NORM_5,
    "patch_size": to("patch_size", size, 4),
    "embed_dim": to("width", int, 96),
    "depths": to("depths", ints, (2, 2, 6, 2)),
    "num_heads": to("heads", ints, (3, 6, 12, 24)),
    "window_size": to("window", int, 7),
    "mlp_ratio": to("mlp_ratio", float, 4.0),
    "qkv_bias": to("qkv_bias", flag, True),
    "drop_path_rate": to("drop_path", float, 0.1),
}
OFFICIAL_SWIN = {
    **SWIN,
    **DROPOUT,
    **QK_SCALE,
    "ape": to("position", flag, False),
    "patch_norm": to("patch_norm", flag, True),
    "use_checkpoint": to("remat", flag, False),
}
TIMM_SWIN = {
    **SWIN,
    "proj_drop_rate": to("dropout", float, 0.0),
    "global_pool": only("avg", why="other poolings"),
    "head_dim": only(None, why="other widths of heads"),
    "embed_layer": only(None, "PatchEmbed", why=CODE),
    "drop_rate": only(0, why="there is no dropout before the classifier"),
    **unused(strict_img_size=True, weight_init=""),  # fresh parameters; other sizes than img_size
}
CONVNEXT = {
    **IMAGES,  # the classes take images of any size; ours is built for one
    **DROP_PATH,
    "depths": to("depths", ints, (3, 3, 9, 3)),
    "dims": to("widths", ints, (96, 192, 384, 768)),
    **unused(head_init_scale=1.0),  # fresh parameters only
}
OFFICIAL_CONVNEXT = {
    **CONVNEXT,
    "layer_scale_init_value": to("layer_scale", lambda v: float(v) if float(v) > 0 else None, 1e-6),
}
TIMM_CONVNEXT = {
    **CONVNEXT,
    "patch_size": to("patch_size", size, 4),
    "ls_init_value": to("layer_scale", optional(float), 1e-6),
    "norm_eps": to("norm_eps", optional(float, 1e-6), None),
    "kernel_sizes": to("kernel", lambda value: one_of(value), 7),
    "global_pool": only("avg", why="other poolings"),
    "output_stride": only(32, why="a finer last grid needs dilated convolutions"),
    "stem_type": only("patch", why="other stems"),
    "head_norm_first": only(False, why="other orders"),
    "head_hidden_size": only(None, why="other heads"),
    "conv_mlp": only(False, why="other layouts"),
    "conv_bias": only(True, why="without biases"),
    "use_grn": only(False, why="ConvNeXt V2"),
    "act_layer": only("gelu", None, "GELU", "nn.GELU", why="other activations"),
    "norm_layer": only(None, why=CODE),
    "drop_rate": only(0, why="there is no dropout before the classifier"),
}


def one_of(value: Any) -> int:
    """One number that all stages share."""
    values = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(values) != 1:
        raise ValueError("only one size for all stages is implemented")
    return int(values.pop())


# DVT: what its wrappers pass to each exit; may be given to import smaller ones.

DVT_WHY = "its token grids are written for that"


def _dvt(family: str, more: Mapping[str, Argument] = {}, **defaults: Any) -> dict[str, Argument]:
    return {
        **IMAGES,
        "img_size": to("img_size", only(224, why=DVT_WHY).convert, 224),
        **with_defaults(BLOCKS, **defaults),
        "feature_reuse": to("feature_reuse", flag, True),
        "relation_reuse": to("relation_reuse", flag, True),
        "family": only(family, why="that is this class's"),
        **more,
    }


DVT_T2T = {name: T2T[name] for name in ("token_dim", "tokens_type")}


def _exits(a: Values) -> dict[str, Any]:
    return {"exits": (7, 10, 14)}


# Repository and class -> row. Several repositories have the same class.
OFFICIAL: dict[str, Official] = {
    "timm/VisionTransformer": Official("vit_small_patch16_224", TIMM_VIT, _timm_vit),
    "timm/VisionTransformerDistilled": Official("vit_small_patch16_224", TIMM_VIT, _timm_vit_distilled),
    "dynamicvit/VisionTransformerDiffPruning": Official(
        # distill changes what training returns, not what it computes.
        "vit_small_patch16_224",
        {**DYNAMICVIT, **PRUNING, **unused(distill=False)},
        _dynamicvit,
    ),
    "dynamicvit/VisionTransformerTeacher": Official("vit_small_patch16_224", DYNAMICVIT),
    "tps/DynamicVit": Official("vit_small_patch16_224", TPS, _tps),
    "evit/EViT": Official("vit_small_patch16_224", EVIT, _evit),
    "evit+tps/EViT": Official("vit_small_patch16_224", EVIT, _etps),
    "lvvit/LV_ViT": Official("lvvit_s", LVVIT, _lvvit),
    "dynamicvit/LVViTDiffPruning": Official(
        "lvvit_s",
        {**LVVIT, **PRUNING, **unused(distill=False, viz_mode=False)},  # what is returned
        lambda a: {**_lvvit_of_dynamicvit(a), **_dynamicvit(a)},
    ),
    # Its logits are those of the class token alone.
    "dynamicvit/LVViT_Teacher": Official("lvvit_s", LVVIT, lambda a: _lvvit_of_dynamicvit(a, aux_weight=0.0)),
    "t2t/T2T_ViT": Official("t2t_vit_14", T2T),
    "psvit/PSViT": Official("psvit_b_14", PSVIT, _psvit),
    "pvt/PyramidVisionTransformer": Official("pvt_small", PVT, _pvt),
    "cvt/ConvolutionalVisionTransformer": Official("cvt_13", CVT, _cvt),
    "swin/SwinTransformer": Official(
        # fused_window_process is a faster way to the same numbers.
        "swin_tiny_patch4_window7_224",
        {**OFFICIAL_SWIN, **unused(fused_window_process=False)},
    ),
    "timm/SwinTransformer": Official("swin_tiny_patch4_window7_224", TIMM_SWIN),
    "dynamicvit/SwinTransformer_Teacher": Official("swin_tiny_patch4_window7_224", OFFICIAL_SWIN),
    "dynamicvit/AdaSwinTransformer": Official(
        "swin_tiny_patch4_window7_224",
        {
            **OFFICIAL_SWIN,
            "pruning_loc": Argument((4, 8, 12)),
            "sparse_ratio": Argument((0.9, 0.7, 0.5)),
        },
        _dynamicvit,
    ),
    "convnext/ConvNeXt": Official("convnext_tiny", OFFICIAL_CONVNEXT),
    "timm/ConvNeXt": Official("convnext_tiny", TIMM_CONVNEXT),
    "dynamicvit/ConvNeXt": Official("convnext_tiny", OFFICIAL_CONVNEXT),
    "dynamicvit/ConvNeXt_Teacher": Official("convnext_tiny", OFFICIAL_CONVNEXT),
    "dynamicvit/AdaConvNeXt": Official(
        "convnext_tiny",
        {
            **OFFICIAL_CONVNEXT,
            "pruning_loc": Argument((1, 2, 3)),
            "sparse_ratio": Argument((0.75, 0.5, 0.25)),
        },
        _dynamicvit,
    ),
    "dvt/DVT_Deit_small_model": Official(
        "dvt_deit_small", _dvt("deit", embed_dim=384, num_heads=6, qkv_bias=True), _exits
    ),
    "dvt/DVT_T2t_vit_12_model": Official(
        "dvt_t2t_vit_12", _dvt("t2t", DVT_T2T, embed_dim=256, num_heads=4, mlp_ratio=2.0), _exits
    ),
    "dvt/DVT_T2t_vit_14_model": Official(
        "dvt_t2t_vit_14", _dvt("t2t", DVT_T2T, embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0), _exits
    ),
}
# Recognised in the repository string, in this order; a composition names two.
REPOSITORIES = (
    ("lvvit", ("tokenlabeling",)),
    ("psvit", ("ps-vit",)),
    ("pvt", ("whai362/pvt",)),
    ("cvt", ("microsoft/cvt",)),
    ("evit+tps", ("evit", "tps")),
    ("evit", ("evit",)),
    ("tps", ("tps",)),
    ("dynamicvit", ("dynamicvit",)),
    ("t2t", ("t2t-vit",)),
    ("dvt", ("dynamic-vision-transformer",)),
    ("swin", ("swin-transformer",)),
    ("convnext", ("convnext",)),
    ("timm", ("timm",)),
    ("timm", ("pytorch-image-models",)),
    ("timm", ("facebookresearch/deit",)),
)


def find_reference(repository: str, cls: str) -> str:
    """Row of `OFFICIAL` for a repository string and a class name.

    Raises:
      WeightsError: unknown repository or class.
    """
    text = repository.lower()
    for name, parts in REPOSITORIES:
        if all(part in text for part in parts):
            # A class may be given with its file and with its module: "models/pvt.py PVT", "pvt.PVT".
            first = next((word for word in cls.split() if "/" not in word), cls)
            row = f"{name}/{first.rsplit('.', 1)[-1]}"
            if row in OFFICIAL:
                return row
            known = [other for other in OFFICIAL if other.startswith(f"{name}/")]
            raise WeightsError(f"class {cls!r} of {repository} cannot be imported; known: {', '.join(known)}")
    known = sorted({row.split("/")[0] for row in OFFICIAL})
    raise WeightsError(f"repository {repository!r} cannot be imported; known: {', '.join(known)}")


def build(repository: str, cls: str, constructor: Values) -> Reference:
    """The model that equals an official class with these constructor arguments."""
    row = find_reference(repository, cls)
    given = dict(constructor)
    if row == "tps/DynamicVit" and " with TPSModule" in cls:
        given.setdefault("token_merge_module", "TPSModule()")
    return OFFICIAL[row].build(row.split("/")[1], given)
