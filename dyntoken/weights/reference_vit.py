"""Constructor arguments of the official ViT-based classes: timm, DynamicViT, TPS, EViT."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dyntoken.models import create_model
from dyntoken.weights.files import WeightsError
from dyntoken.weights.references import Arguments, Reference

COMMON = {
    "img_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "num_classes": 1000,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "norm_layer": None,
    "act_layer": None,
}
GELU = (None, "GELU", "nn.GELU", "gelu")


def _fields(arguments: Arguments) -> dict[str, Any]:
    """What all these classes share, as fields of our backbone."""
    return {
        "img_size": arguments.size("img_size"),
        "patch_size": arguments.size("patch_size"),
        "in_chans": int(arguments["in_chans"]),
        "num_classes": int(arguments["num_classes"]),
        "width": int(arguments["embed_dim"]),
        "depth": int(arguments["depth"]),
        "heads": int(arguments["num_heads"]),
        "mlp_ratio": arguments.number("mlp_ratio"),
        "qkv_bias": arguments.flag("qkv_bias"),
        "drop_path": arguments.number("drop_path_rate"),
    }


def _create(method: str | None, fields: Mapping[str, Any], grid_only: bool = False) -> Reference:
    name = "vit_small_patch16_224"  # every field that the size stands for is overridden
    model = create_model(f"{method}_{name}" if method else name, **fields)
    return Reference(model, model.plain().prefix if grid_only else 0)


TIMM = {
    **COMMON,
    "global_pool": "token",
    "qkv_bias": True,
    "qk_norm": False,
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "proj_bias": True,
    "init_values": None,
    "class_token": True,
    "pos_embed": "learn",
    "no_embed_class": False,
    "reg_tokens": 0,
    "pre_norm": False,
    "final_norm": True,
    "fc_norm": None,
    "pool_include_prefix": False,
    "dynamic_img_size": False,
    "dynamic_img_pad": False,
    "pos_drop_rate": 0.0,
    "patch_drop_rate": 0.0,
    "proj_drop_rate": 0.0,
    "weight_init": "",
    "fix_init": False,
    "embed_layer": None,
    "embed_norm_layer": None,
    "block_fn": None,
    "mlp_layer": None,
    "attn_layer": None,
}

# Values that this library implements, where there are not all.
TIMM_ONLY = {
    # Further norms inside attention and MLP; no published model has them.
    **dict.fromkeys(("scale_attn_norm", "scale_mlp_norm"), (False,)),
    # Dropping patches is what a reduction method does (random scores); dropout before the classifier is none of ours.
    **dict.fromkeys(("patch_drop_rate", "drop_rate"), (0,)),
    # Code: which class computes a part.
    "embed_layer": (None, "PatchEmbed"),
    "embed_norm_layer": (None,),
    "block_fn": (None, "Block"),
    "mlp_layer": (None, "Mlp", "SwiGLUPacked"),
    "attn_layer": (None, "Attention"),
    "pos_embed": ("learn", "none", ""),
    "global_pool": ("token", "avg"),
}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelutanh": "gelu_tanh",
    "quickgelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


def activation(arguments: Arguments) -> str:
    """`act_layer` as our `activation`: timm's name or a class's, "nn.SiLU"."""
    name = str(arguments["act_layer"] or "gelu").rsplit(".", 1)[-1].lower().replace("_", "")
    if name not in ACTIVATIONS:
        arguments.only(act_layer=tuple(ACTIVATIONS.values()))
    return ACTIVATIONS[name]


def timm_vit(constructor: Mapping[str, Any], cls: str = "VisionTransformer") -> Reference:
    """timm's `VisionTransformer` (huggingface/pytorch-image-models), DeiT's own names."""
    arguments = Arguments(cls, constructor, TIMM)
    arguments.only(**TIMM_ONLY)
    # weight_init and fix_init only concern fresh parameters, dynamic_img_size and dynamic_img_pad other
    # sizes than img_size, for which ours is built.
    mean = arguments["global_pool"] == "avg"
    token, registers = arguments.flag("class_token"), int(arguments["reg_tokens"] or 0)
    if not mean and not token:
        raise WeightsError(f"{cls}(global_pool='token') needs class_token=True")
    # The norm comes after pooling where it pools patches, unless told otherwise.
    after = mean if arguments["fc_norm"] is None else arguments.flag("fc_norm")
    final = arguments.flag("final_norm")
    scale = arguments["init_values"]
    packed = arguments["mlp_layer"] == "SwiGLUPacked"
    if packed and activation(arguments) != "silu":
        raise WeightsError(f"{cls}(mlp_layer='SwiGLUPacked') needs act_layer='silu'")
    fields = {
        **_fields(arguments),
        "norm_eps": arguments.epsilon(1e-6),
        "class_token": token,
        "registers": registers,
        "dropout": arguments.number("proj_drop_rate"),
        "pos_dropout": arguments.number("pos_drop_rate"),
        "attn_dropout": arguments.number("attn_drop_rate"),
        "layer_scale": None if scale is None else float(scale),
        "pool": ("all" if arguments.flag("pool_include_prefix") else "mean") if mean else "token",
        "position": arguments["pos_embed"] == "learn",
        "final_norm": final and not after,
        "fc_norm": final and after,
        "activation": "swiglu" if packed else activation(arguments),
        "distilled": cls == "VisionTransformerDistilled",
        **{name: arguments.flag(name) for name in ("proj_bias", "qk_norm", "pre_norm")},
    }
    return _create(None, fields, arguments.flag("no_embed_class"))


def timm_vit_distilled(constructor: Mapping[str, Any]) -> Reference:
    """timm's `VisionTransformerDistilled`: class and distillation token, two heads."""
    given = dict(constructor)
    if given.get("no_embed_class"):
        raise WeightsError("VisionTransformerDistilled always embeds its prefix tokens: drop no_embed_class")
    return timm_vit(given, "VisionTransformerDistilled")


DYNAMICVIT = {
    **{name: value for name, value in COMMON.items() if name != "act_layer"},
    "qkv_bias": True,
    "qk_scale": None,
    "representation_size": None,
    "hybrid_backbone": None,
}


def _dynamicvit_fields(arguments: Arguments) -> dict[str, Any]:
    # attn_drop_rate is never applied in the class's attention.
    arguments.only(hybrid_backbone=(None,))
    scale, size = arguments["qk_scale"], arguments["representation_size"]
    return {
        **_fields(arguments),
        "norm_eps": arguments.epsilon(1e-6),
        "qk_scale": float(scale) if scale else None,
        "representation_size": int(size) if size else None,
        "dropout": arguments.number("drop_rate"),
    }


def dynamicvit(constructor: Mapping[str, Any]) -> Reference:
    """`VisionTransformerDiffPruning` of raoyongming/DynamicViT."""
    defaults = {**DYNAMICVIT, "pruning_loc": None, "token_ratio": None, "distill": False}
    arguments = Arguments("VisionTransformerDiffPruning", constructor, defaults)
    # distill changes what training returns, not what it computes.
    at, ratios = arguments["pruning_loc"], arguments["token_ratio"]
    if not at or not ratios:
        raise WeightsError("VisionTransformerDiffPruning needs pruning_loc and token_ratio")
    fields = {**_dynamicvit_fields(arguments), **prune_sites("VisionTransformerDiffPruning", at, ratios)}
    return _create("dynamicvit", fields)


def dynamicvit_teacher(constructor: Mapping[str, Any]) -> Reference:
    """`VisionTransformerTeacher` of raoyongming/DynamicViT: a plain DeiT."""
    return _create(None, _dynamicvit_fields(Arguments("VisionTransformerTeacher", constructor, DYNAMICVIT)))


def prune_sites(cls: str, at: Sequence[int], ratios: Sequence[float]) -> dict[str, Any]:
    """Both repositories take the ratios in the order of the blocks."""
    if len(ratios) < len(set(at)):
        raise WeightsError(f"{cls}: {len(ratios)} keep ratios for {len(set(at))} prune locations")
    at = tuple(sorted({int(index) for index in at}))
    return {"at": at, "keep": tuple(float(ratio) for ratio in ratios[: len(at)])}


TPS = {
    **COMMON,
    "qkv_bias": False,
    "qk_scale": None,
    "global_pool": None,
    "block_layers": "Block",
    "Patch_layer": "PatchEmbed",
    "Attention_block": "Attention",
    "Mlp_block": "Mlp",
    "dpr_constant": True,
    "init_scale": 1e-4,
    "no_embed_class": True,
    "prune_loc": (3, 6, 9),
    "keep_ratio": 0.7,
    "momentum": 0.9,
    "prune_th_init": 1.0,
    "token_merge_module": None,
    "grad_checkpoint_layers": (0, 1, 2),
    "token_score_head_cls": "PredictorLG",
    "reuse_last_attn": False,
    "shuffle_score": False,
}

TPS_ONLY = {
    "block_layers": ("Block",),
    "Patch_layer": ("PatchEmbed",),
    "Attention_block": ("Attention",),
    "Mlp_block": ("Mlp",),
    "token_score_head_cls": ("PredictorLG",),
    **dict.fromkeys(("shuffle_score", "drop_rate"), (0,)),
}


def tps(constructor: Mapping[str, Any]) -> Reference:
    """`DynamicVit` of megvii-research/TPS-CVPR2023, with or without its `token_merge_module`.

    `token_merge_module`: None (DynamicViT), a mapping of `TPSModule` arguments,
    or text such as "TPSModule(temperature=1)".
    """
    arguments = Arguments("DynamicVit", constructor, TPS)
    arguments.only(**TPS_ONLY)
    # The class stores the other arguments (init_scale, momentum, ...) without using them.
    scale = arguments["qk_scale"]
    fields = {
        **_fields(arguments),
        "norm_eps": arguments.epsilon(1e-5),
        "qk_scale": float(scale) if scale else None,
        "drop_path_rule": "constant",
        "activation": activation(arguments),
    }
    grid_only = arguments.flag("no_embed_class")
    at, ratio = arguments["prune_loc"] or (), arguments["keep_ratio"]
    if not at:
        return _create(None, fields, grid_only)
    powers = isinstance(ratio, (int, float))
    ratios = [float(ratio) ** (k + 1) for k in range(len(set(at)))] if powers else list(ratio)
    fields.update(prune_sites("DynamicVit", at, ratios))
    merge = tps_options(arguments["token_merge_module"])
    if merge is None:
        return _create("dynamicvit", fields, grid_only)
    return _create("dtps", {**fields, **merge}, grid_only)


def tps_options(module: Any) -> dict[str, Any] | None:
    """`TPSModule` arguments as options of dTPS; None for no module.

    Raises:
      WeightsError: not a `TPSModule`, or arguments it does not have.
    """
    if module is None:
        return None
    if isinstance(module, str):
        found = re.fullmatch(r"\s*TPSModule\s*(?:\((.*)\))?\s*", module)
        if not found:
            raise WeightsError(
                f"token_merge_module={module!r} cannot be imported: only TPSModule(...) is implemented"
            )
        pairs = [part.split("=") for part in (found.group(1) or "").split(",") if part.strip()]
        if any(len(pair) != 2 for pair in pairs):
            raise WeightsError(f"token_merge_module={module!r}: write its arguments as name=value")
        module = {name.strip(): value.strip() for name, value in pairs}
    arguments = Arguments("TPSModule", module, {"l2_norm": True, "temperature": 1})
    return {
        "temperature": arguments.number("temperature"),
        "similarity": "cosine" if arguments.flag("l2_norm") else "dot",
    }


EVIT = {
    **COMMON,
    "qkv_bias": True,
    "representation_size": None,
    "distilled": False,
    "embed_layer": "PatchEmbed",
    "weight_init": "",
    "keep_rate": (1,),
    "fuse_token": False,
}


def evit(constructor: Mapping[str, Any], composed: bool = False) -> Reference:
    """`EViT` of youweiliang/evit; blocks whose `keep_rate` is below 1 are the sites."""
    arguments = Arguments("EViT", constructor, EVIT)
    arguments.only(embed_layer=("PatchEmbed", None))
    rates = per_block(arguments["keep_rate"], int(arguments["depth"]))
    size, distilled = arguments["representation_size"], arguments.flag("distilled")
    fields = {
        **_fields(arguments),
        "norm_eps": arguments.epsilon(1e-6),
        "representation_size": int(size) if size and not distilled else None,
        "dropout": arguments.number("drop_rate"),
        "attn_dropout": arguments.number("attn_drop_rate"),
        "activation": activation(arguments),
        "distilled": distilled,
    }
    fused = arguments.flag("fuse_token")
    sites = evit_sites(rates)
    if not sites["at"]:
        return _create(None, fields)
    if distilled:
        raise WeightsError(
            "EViT(distilled=True) with keep_rate < 1 ranks its distillation token among the patches and "
            "returns one sample only; import it with keep_rate=(1,)"
        )
    return _create("etps" if composed else "evit" if fused else "topk", {**fields, **sites})


def etps(constructor: Mapping[str, Any]) -> Reference:
    """EViT's selection with TPS's squeezing in place of the fused token."""
    return evit(constructor, composed=True)


def evit_sites(
    rates: Sequence[float],
    call_rate: float | Sequence[float] | None = None,
    tokens: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Where and how much EViT prunes, as `keep` and `at` of `model.clone`.

    A block prunes if its own rate and the call's rate are below 1, or if
    `tokens` gives it a count.

    Args:
      rates: constructor's keep rate of every block.
      call_rate: `keep_rate` of the call: one number, or one per block (None: own).
      tokens: `tokens` of the call: a count or None per block.
    """
    depth = len(rates)
    calls = list(call_rate) if isinstance(call_rate, (list, tuple)) else [call_rate] * depth
    counts = list(tokens) if isinstance(tokens, (list, tuple)) else [tokens] * depth
    if len(calls) != depth or len(counts) != depth:
        raise WeightsError(f"keep_rate and tokens of the call must have one entry per block ({depth})")
    at, keep = [], []
    for index, (own, call, count) in enumerate(zip(rates, calls, counts, strict=True)):
        call = own if call is None else call
        if count is not None:
            at.append(index)
            keep.append(int(count))
        elif own < 1 and call < 1:
            at.append(index)
            keep.append(float(call))
    return {"at": tuple(at), "keep": tuple(keep)}


def per_block(rates: Any, depth: int) -> tuple[float, ...]:
    """EViT's `keep_rate` argument as one rate per block."""
    rates = tuple(rates) if isinstance(rates, (list, tuple)) else (rates,)
    rates = rates * depth if len(rates) == 1 else rates
    if len(rates) != depth or not all(0 < rate <= 1 and math.isfinite(rate) for rate in rates):
        raise WeightsError(
            f"EViT(keep_rate={rates}): one rate in (0, 1] per block ({depth}), or a single one"
        )
    return rates
