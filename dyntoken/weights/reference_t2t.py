"""Constructor arguments of T2T-ViT (yitu-opensource/T2T-ViT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyntoken.models import create_model
from dyntoken.weights.references import Arguments, Reference

T2T = {
    "img_size": 224,
    "tokens_type": "performer",
    "in_chans": 3,
    "num_classes": 1000,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "qkv_bias": False,
    "qk_scale": None,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "norm_layer": None,
    "token_dim": 64,
}


def t2t(constructor: Mapping[str, Any]) -> Reference:
    """`T2T_ViT`, with performer or transformer modules."""
    arguments = Arguments("T2T_ViT", constructor, T2T)
    arguments.only(tokens_type=("performer", "transformer"))
    scale = arguments["qk_scale"]
    model = create_model(
        "t2t_vit_14",  # every field that the size stands for is overridden
        img_size=arguments.size("img_size"),
        tokens_type=arguments["tokens_type"],
        in_chans=int(arguments["in_chans"]),
        num_classes=int(arguments["num_classes"]),
        width=int(arguments["embed_dim"]),
        depth=int(arguments["depth"]),
        heads=int(arguments["num_heads"]),
        mlp_ratio=arguments.number("mlp_ratio"),
        qkv_bias=arguments.flag("qkv_bias"),
        qk_scale=float(scale) if scale else None,
        dropout=arguments.number("drop_rate"),
        attn_dropout=arguments.number("attn_drop_rate"),
        drop_path=arguments.number("drop_path_rate"),
        norm_eps=arguments.epsilon(1e-5),
        token_dim=int(arguments["token_dim"]),
    )
    return Reference(model)
