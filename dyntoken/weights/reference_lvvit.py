"""Constructor arguments of LV-ViT (zihangJiang/TokenLabeling) and of DynamicViT's LV-ViT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyntoken.models import create_model
from dyntoken.weights.files import WeightsError
from dyntoken.weights.reference_vit import prune_sites
from dyntoken.weights.references import Arguments, Reference

LVVIT = {
    "img_size": 224,
    "patch_size": 16,
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
    "drop_path_decay": "linear",
    "hybrid_backbone": None,
    "norm_layer": None,
    "p_emb": "4_2",
    "head_dim": None,
    "skip_lam": 1.0,
    "order": None,
    "mix_token": False,
    "return_dense": False,
}
# p_emb -> (stem, its channels); the official classes take any other value for plain patches.
STEMS = {"4_2": ("conv", 64), "4_2_128": ("conv", 128)}
DECAYS = {"linear": "linear", "fix": "constant"}


def lvvit(constructor: Mapping[str, Any]) -> Reference:
    """`LV_ViT` of zihangJiang/TokenLabeling."""
    arguments = Arguments("LV_ViT", constructor, LVVIT)
    mix = arguments.flag("mix_token")
    if mix and not arguments.flag("return_dense"):
        raise WeightsError("LV_ViT(mix_token=True) needs return_dense=True")
    fields = {**_fields(arguments, drops=True), "mix_token": mix}
    return _create(None, {**fields, "attn_dropout": arguments.number("attn_drop_rate")})


def dynamicvit(constructor: Mapping[str, Any]) -> Reference:
    """`LVViTDiffPruning` of raoyongming/DynamicViT, which ignores its `mix_token`."""
    cls = "LVViTDiffPruning"
    arguments = Arguments(
        cls,
        constructor,
        {**LVVIT, "pruning_loc": None, "token_ratio": None, "distill": False, "viz_mode": False},
    )
    # distill and viz_mode change what is returned, not what is computed.
    at, ratios = arguments["pruning_loc"], arguments["token_ratio"]
    if not at or not ratios:
        raise WeightsError(f"{cls} needs pruning_loc and token_ratio")
    _needs_dense(arguments)
    return _create("dynamicvit", {**_fields(arguments), **prune_sites(cls, at, ratios)})


def teacher(constructor: Mapping[str, Any]) -> Reference:
    """`LVViT_Teacher` of raoyongming/DynamicViT: its logits are those of the class token alone."""
    arguments = Arguments("LVViT_Teacher", constructor, LVVIT)
    _needs_dense(arguments)
    return _create(None, {**_fields(arguments), "aux_weight": 0.0})


def _needs_dense(arguments: Arguments) -> None:
    if not arguments.flag("return_dense"):
        raise WeightsError(
            f"{arguments.cls} always calls its auxiliary head: import it with return_dense=True"
        )


def _fields(arguments: Arguments, drops: bool = False) -> dict[str, Any]:
    arguments.only(hybrid_backbone=(None,), head_dim=(None,), drop_path_decay=tuple(DECAYS))
    if not drops:
        arguments.only(attn_drop_rate=(0,))
    order, scale = arguments["order"], arguments["qk_scale"]
    if order is not None and set(order) != {"tr"}:
        raise WeightsError(
            f"{arguments.cls}(order={order!r}) cannot be imported: only 'tr' blocks are implemented"
        )
    stem, channels = STEMS.get(arguments["p_emb"], ("patch", 64))
    return {
        "img_size": arguments.size("img_size"),
        "patch_size": arguments.size("patch_size"),
        "in_chans": int(arguments["in_chans"]),
        "num_classes": int(arguments["num_classes"]),
        "width": int(arguments["embed_dim"]),
        "depth": int(arguments["depth"]) if order is None else len(order),  # order goes before depth
        "heads": int(arguments["num_heads"]),
        "mlp_ratio": arguments.number("mlp_ratio"),
        "qkv_bias": arguments.flag("qkv_bias"),
        "qk_scale": float(scale) if scale else None,
        "dropout": arguments.number("drop_rate"),
        "drop_path": arguments.number("drop_path_rate"),
        "drop_path_rule": DECAYS[arguments["drop_path_decay"]],
        "norm_eps": arguments.epsilon(1e-5),
        "skip_lam": arguments.number("skip_lam"),
        "stem": stem,
        "stem_width": channels,
        "aux_weight": 0.5 if arguments.flag("return_dense") else None,
    }


def _create(method: str | None, fields: Mapping[str, Any]) -> Reference:
    # Every field that the size stands for is overridden.
    return Reference(create_model(f"{method}_lvvit_s" if method else "lvvit_s", **fields))
