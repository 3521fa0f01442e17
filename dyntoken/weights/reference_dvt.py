"""Constructor arguments of DVT (blackfeather-wang/Dynamic-Vision-Transformer)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyntoken.models import create_model
from dyntoken.weights.references import Arguments, Reference

WRAPPER = {"feature_reuse": True, "relation_reuse": True, "num_classes": 1000, "img_size": 224}
# What the wrappers pass to each exit; may be given to import smaller ones.
DEIT = {"embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0, "qkv_bias": True}
T2T = {"qkv_bias": False, "token_dim": 64, "tokens_type": "performer"}
T2T_12 = {"embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 2.0, **T2T}
T2T_14 = {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0, **T2T}


def deit(constructor: Mapping[str, Any]) -> Reference:
    """`DVT_Deit_small_model`: exits of 7x7, 10x10 and 14x14 tokens."""
    arguments = Arguments("DVT_Deit_small_model", constructor, {**WRAPPER, "family": "deit", **DEIT})
    arguments.only(family=("deit",))
    return Reference(create_model("dvt_deit_small", **_fields(arguments)))


def t2t_12(constructor: Mapping[str, Any]) -> Reference:
    """`DVT_T2t_vit_12_model`."""
    return _t2t(12, constructor, T2T_12)


def t2t_14(constructor: Mapping[str, Any]) -> Reference:
    """`DVT_T2t_vit_14_model`."""
    return _t2t(14, constructor, T2T_14)


def _t2t(number: int, constructor: Mapping[str, Any], sizes: Mapping[str, Any]) -> Reference:
    arguments = Arguments(f"DVT_T2t_vit_{number}_model", constructor, {**WRAPPER, "family": "t2t", **sizes})
    arguments.only(family=("t2t",), tokens_type=("performer", "transformer"))
    more = {"token_dim": int(arguments["token_dim"]), "tokens_type": arguments["tokens_type"]}
    return Reference(create_model(f"dvt_t2t_vit_{number}", **_fields(arguments), **more))


def _fields(arguments: Arguments) -> dict[str, Any]:
    arguments.only(img_size=(224,))  # its token grids are hard-coded
    return {
        "exits": (7, 10, 14),
        "img_size": 224,
        "feature_reuse": arguments.flag("feature_reuse"),
        "relation_reuse": arguments.flag("relation_reuse"),
        "num_classes": int(arguments["num_classes"]),
        "width": int(arguments["embed_dim"]),
        "depth": int(arguments["depth"]),
        "heads": int(arguments["num_heads"]),
        "mlp_ratio": arguments.number("mlp_ratio"),
        "qkv_bias": arguments.flag("qkv_bias"),
    }
