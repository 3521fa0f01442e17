"""Constructor arguments of PS-ViT (yuexy/PS-ViT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyntoken.models import create_model
from dyntoken.weights.files import WeightsError
from dyntoken.weights.references import Arguments, Reference

PSVIT = {
    "img_size": 224,
    "num_point_w": 14,
    "num_point_h": 14,
    "in_chans": 3,
    "downsample_ratio": 4,
    "num_classes": 1000,
    "num_iters": 4,
    "depth": 14,
    "embed_dim": 384,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "qkv_bias": False,
    "qk_scale": None,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "norm_layer": None,
    "stem_layer": None,
    "offset_gamma": 0.1,
    "offset_bias": False,
    "with_cls_token": False,
    "stem": None,
}


def psvit(constructor: Mapping[str, Any]) -> Reference:
    """`PSViT`.

    A stem of other channels than the class's own is given as `stem`: those of
    the first convolution, inside and after the first bottleneck, inside the
    second (the builders use 64, 64, 256, 64; in Ti 64, 64, 192, 64).
    """
    arguments = Arguments("PSViT", constructor, PSVIT)
    arguments.only(downsample_ratio=(4,), stem_layer=(None,))
    width, iterations = int(arguments["embed_dim"]), int(arguments["num_iters"])
    depth, scale = int(arguments["depth"]) - iterations, arguments["qk_scale"]
    if depth < 1:
        raise WeightsError(f"PSViT(depth={arguments['depth']}) leaves no block after {iterations} iterations")
    token = arguments.flag("with_cls_token")
    model = create_model(
        "psvit_b_14",  # every field that the size stands for is overridden
        img_size=arguments.size("img_size"),
        points=(int(arguments["num_point_h"]), int(arguments["num_point_w"])),
        in_chans=int(arguments["in_chans"]),
        num_classes=int(arguments["num_classes"]),
        iterations=iterations,
        depth=depth,
        width=width,
        heads=int(arguments["num_heads"]),
        mlp_ratio=arguments.number("mlp_ratio"),
        qkv_bias=arguments.flag("qkv_bias"),
        qk_scale=float(scale) if scale else None,
        dropout=arguments.number("drop_rate"),
        attn_dropout=arguments.number("attn_drop_rate"),
        drop_path=arguments.number("drop_path_rate"),
        norm_eps=arguments.epsilon(1e-5),
        gamma=arguments.number("offset_gamma"),
        offset_bias=arguments.flag("offset_bias"),
        stem_channels=tuple(int(n) for n in arguments["stem"] or (64, 64, width, 64)),
        class_token=token,
        pool="token" if token else "mean",
    )
    return Reference(model)
