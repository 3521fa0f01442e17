"""Constructor arguments of Swin (microsoft/Swin-Transformer, timm) and of DynamicViT's Swin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyntoken.models import create_model
from dyntoken.weights.reference_vit import prune_sites
from dyntoken.weights.references import Arguments, Reference

SHARED = {
    "img_size": 224,
    "patch_size": 4,
    "in_chans": 3,
    "num_classes": 1000,
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "window_size": 7,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.1,
    "norm_layer": None,
}
SWIN = {**SHARED, "qk_scale": None, "ape": False, "patch_norm": True, "use_checkpoint": False}
TIMM = {
    **SHARED,
    "global_pool": "avg",
    "head_dim": None,
    "strict_img_size": True,
    "proj_drop_rate": 0.0,
    "embed_layer": None,
    "weight_init": "",
}


def swin(constructor: Mapping[str, Any]) -> Reference:
    """`SwinTransformer` of microsoft/Swin-Transformer."""
    # fused_window_process is a faster way to the same numbers.
    return _official("SwinTransformer", {**SWIN, "fused_window_process": False}, constructor)


def teacher(constructor: Mapping[str, Any]) -> Reference:
    """`SwinTransformer_Teacher` of raoyongming/DynamicViT: a plain Swin."""
    return _official("SwinTransformer_Teacher", SWIN, constructor)


def dynamicvit(constructor: Mapping[str, Any]) -> Reference:
    """`AdaSwinTransformer` of raoyongming/DynamicViT."""
    cls = "AdaSwinTransformer"
    own = {"sparse_ratio": (0.9, 0.7, 0.5), "pruning_loc": (4, 8, 12)}
    arguments = Arguments(cls, constructor, {**SWIN, **own})
    sites = prune_sites(cls, arguments["pruning_loc"], arguments["sparse_ratio"])
    return _create("dynamicvit", {**_official_fields(arguments), **sites})


def timm(constructor: Mapping[str, Any]) -> Reference:
    """timm's `SwinTransformer`."""
    arguments = Arguments("SwinTransformer", constructor, TIMM)
    # strict_img_size and weight_init change neither parameters nor results.
    arguments.only(
        global_pool=("avg",), head_dim=(None,), embed_layer=(None, "PatchEmbed"), drop_rate=(0, 0.0)
    )
    return _create(None, {**_fields(arguments), "dropout": arguments.number("proj_drop_rate")})


def _official(cls: str, defaults: Mapping[str, Any], constructor: Mapping[str, Any]) -> Reference:
    return _create(None, _official_fields(Arguments(cls, constructor, defaults)))


def _official_fields(arguments: Arguments) -> dict[str, Any]:
    scale = arguments["qk_scale"]
    return {
        **_fields(arguments),
        "qk_scale": float(scale) if scale else None,
        "dropout": arguments.number("drop_rate"),
        "patch_norm": arguments.flag("patch_norm"),
        "position": arguments.flag("ape"),
        "remat": arguments.flag("use_checkpoint"),
    }


def _fields(arguments: Arguments) -> dict[str, Any]:
    return {
        "img_size": arguments.size("img_size"),
        "patch_size": arguments.size("patch_size"),
        "in_chans": int(arguments["in_chans"]),
        "num_classes": int(arguments["num_classes"]),
        "width": int(arguments["embed_dim"]),
        "depths": tuple(int(n) for n in arguments["depths"]),
        "heads": tuple(int(n) for n in arguments["num_heads"]),
        "window": int(arguments["window_size"]),
        "mlp_ratio": arguments.number("mlp_ratio"),
        "qkv_bias": arguments.flag("qkv_bias"),
        "drop_path": arguments.number("drop_path_rate"),
        "attn_dropout": arguments.number("attn_drop_rate"),
        "norm_eps": arguments.epsilon(1e-5),
    }


def _create(method: str | None, fields: Mapping[str, Any]) -> Reference:
    name = "swin_tiny_patch4_window7_224"  # every field that the size stands for is overridden
    return Reference(create_model(f"{method}_{name}" if method else name, **fields))
