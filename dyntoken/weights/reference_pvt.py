"""Constructor arguments of PVT v1 (whai362/PVT, classification/pvt.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyntoken.models import create_model
from dyntoken.weights.references import Arguments, Reference

PVT = {
    "img_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "num_classes": 1000,
    "embed_dims": (64, 128, 256, 512),
    "num_heads": (1, 2, 4, 8),
    "mlp_ratios": (4, 4, 4, 4),
    "qkv_bias": False,
    "qk_scale": None,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "norm_layer": None,
    "norm_layer_eps": None,
    "depths": (3, 4, 6, 3),
    "sr_ratios": (8, 4, 2, 1),
    "num_stages": 4,
}


def pvt(constructor: Mapping[str, Any]) -> Reference:
    """`PyramidVisionTransformer`; `norm_layer_eps` is short for `norm_layer="LayerNorm(eps=...)"`."""
    arguments = Arguments("PyramidVisionTransformer", constructor, PVT)
    arguments.only(num_stages=(4,))  # its last norm is that of a fourth stage
    eps, scale = arguments["norm_layer_eps"], arguments["qk_scale"]
    model = create_model(
        "pvt_small",  # every field that the size stands for is overridden
        img_size=arguments.size("img_size"),
        patch_size=int(arguments["patch_size"]),
        in_chans=int(arguments["in_chans"]),
        num_classes=int(arguments["num_classes"]),
        widths=tuple(map(int, arguments["embed_dims"])),
        depths=tuple(map(int, arguments["depths"])),
        heads=tuple(map(int, arguments["num_heads"])),
        mlp_ratios=tuple(map(float, arguments["mlp_ratios"])),
        sr_ratios=tuple(map(int, arguments["sr_ratios"])),
        qkv_bias=arguments.flag("qkv_bias"),
        qk_scale=float(scale) if scale else None,
        dropout=arguments.number("drop_rate"),
        attn_dropout=arguments.number("attn_drop_rate"),
        drop_path=arguments.number("drop_path_rate"),
        norm_eps=arguments.epsilon(1e-5) if eps is None else float(eps),
    )
    return Reference(model)
