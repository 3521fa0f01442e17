"""Official classes with blocks of one width, argument by argument.

A row of `CLASSES` says of every constructor argument which of our fields it becomes, which
values alone are implemented and why, or that it changes nothing; any other argument is an error.
"""

from __future__ import annotations

import math
from typing import Any

from dyntoken.weights import constructors as common
from dyntoken.weights.constructors import Argument, Official, Values, flag, only, per_stage, to, unused

BLOCKS = {
    "embed_dim": to("width", int, 768),
    "depth": to("depth", int, 12),
    "num_heads": to("heads", int, 12),
    "mlp_ratio": to("mlp_ratio", float, 4.0),
    "qkv_bias": to("qkv_bias", flag, False),
}
NORM_6 = {"norm_layer": to("norm_eps", common.epsilon(1e-6), None)}
HYBRID = {"hybrid_backbone": only(None, why="a convolutional network ahead of the patches is code")}
REPRESENTATION = {"representation_size": to("representation_size", lambda v: int(v) if v else None, None)}
VIT = {**common.IMAGES, "patch_size": to("patch_size", per_stage(int), 16), **BLOCKS, **common.DROP_PATH}

# timm, DeiT

TIMM_VIT = {
    **common.with_defaults(VIT, qkv_bias=True),
    **NORM_6,
    **common.HEAD_DROPOUT,
    **common.ATTN_DROPOUT,
    "proj_drop_rate": to("dropout", float, 0.0),
    "pos_drop_rate": to("pos_dropout", float, 0.0),
    "patch_drop_rate": to("patch_drop", float, 0.0),
    "qk_norm": to("qk_norm", flag, False),
    "scale_attn_norm": to("attn_norm", flag, False),
    "scale_mlp_norm": to("mlp_norm", flag, False),
    "proj_bias": to("proj_bias", flag, True),
    "pre_norm": to("pre_norm", flag, False),
    "class_token": to("class_token", flag, True),
    "reg_tokens": to("registers", lambda v: int(v or 0), 0),
    "no_embed_class": Argument(False, flag),
    "init_values": to("layer_scale", common.optional(float), None),
    "pool_include_prefix": to("pool_prefix", flag, False),
    "pos_embed": only("learn", "none", "", why="timm has no others"),
    "global_pool": only("token", "avg", "max", "avgmax", "map", "prr", why="'' gives no logits per image"),
    "fc_norm": Argument(None, common.optional(flag)),
    "final_norm": Argument(True, flag),
    "act_layer": Argument(None, common.activation),
    "mlp_layer": only(None, "Mlp", "SwiGLUPacked", why=common.CODE),
    "embed_layer": only(None, "PatchEmbed", why=common.CODE),
    "embed_norm_layer": only(None, why=common.CODE),
    "block_fn": only(None, "Block", why=common.CODE),
    "attn_layer": only(None, "Attention", why=common.CODE),
    "dynamic_img_pad": to("rest", lambda v: "pad" if flag(v) else "drop", False),
    # Fresh parameters only; images of other sizes than img_size, for which ours is built.
    **unused(weight_init="", fix_init=False, dynamic_img_size=False),
    **unused(device=None, dtype=None),
}
POOLS = {"avg": "mean"}  # timm's name -> ours, where they differ


def timm_vit(a: Values) -> dict[str, Any]:
    """Fields of a ViT that follow from several arguments of timm's `VisionTransformer` at once."""
    pool = POOLS.get(a["global_pool"], a["global_pool"])
    if pool == "token" and not a["class_token"]:
        raise ValueError("global_pool='token' needs class_token=True")
    packed = a["mlp_layer"] == "SwiGLUPacked"
    if packed and a["act_layer"] != "silu":
        raise ValueError("mlp_layer='SwiGLUPacked' needs act_layer='silu'")
    # The norm comes after pooling where it pools patches, unless told otherwise.
    after = pool in ("mean", "max", "avgmax") if a["fc_norm"] is None else a["fc_norm"]
    return {
        "pool": pool,
        "position": a["pos_embed"] == "learn",
        "embed_class": not a["no_embed_class"],
        "final_norm": a["final_norm"] and not after,
        "fc_norm": a["final_norm"] and after,
        "activation": "swiglu" if packed else a["act_layer"],
    }


WHY_TRAINING = "rotations are drawn anew in training only there"
WHY_ROPE = "no checkpoint with another one is known"
EVA = {
    **common.with_defaults(VIT, qkv_bias=True),
    **NORM_6,
    **common.HEAD_DROPOUT,
    **common.ATTN_DROPOUT,
    "proj_drop_rate": to("dropout", float, 0.0),
    "pos_drop_rate": to("pos_dropout", float, 0.0),
    "patch_drop_rate": to("patch_drop", float, 0.0),
    "qk_norm": to("qk_norm", flag, False),
    "scale_attn_inner": to("attn_norm", flag, False),
    "scale_mlp": to("mlp_norm", flag, False),
    "class_token": to("class_token", flag, True),
    "num_reg_tokens": to("registers", lambda v: int(v or 0), 0),
    "init_values": to("layer_scale", common.optional(float), None),
    "use_pre_transformer_norm": to("pre_norm", flag, False),
    "use_abs_pos_emb": to("position", flag, True),
    "rope_temperature": to("rope_base", float, 10000.0),
    "dynamic_img_pad": to("rest", lambda v: "pad" if flag(v) else "drop", False),
    "no_embed_class": Argument(False, flag),
    "qkv_fused": Argument(True, flag),
    "swiglu_mlp": Argument(False, flag),
    "swiglu_align_to": Argument(0, lambda v: int(v or 0)),
    "use_rot_pos_emb": Argument(False, flag),
    "rope_type": only("cat", "dinov3", why=WHY_ROPE),
    "rope_rotate_half": Argument(False, flag),
    "ref_feat_shape": Argument(None, common.optional(per_stage(int))),
    "global_pool": only("avg", "avgmax", "max", "token", "map", why="'' gives no logits per image"),
    "use_fc_norm": Argument(None, common.optional(flag)),
    "use_post_transformer_norm": Argument(None, common.optional(flag)),
    "attn_type": only("eva", "rope", why=common.CODE),
    "attn_only_layer_scale": only(False, why=WHY_ROPE),
    "num_kv_heads": only(None, why="queries share no keys here"),
    "use_post_norm": only(False, why="the norm comes before each branch here"),
    "attn_pool_num_heads": only(None, why=WHY_ROPE),
    "attn_pool_mlp_ratio": only(None, why=WHY_ROPE),
    "rope_grid_offset": only(0.0, why=WHY_ROPE),
    "rope_grid_indexing": only("ij", why=WHY_ROPE),
    **dict.fromkeys(
        ("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"), only(None, why=WHY_TRAINING)
    ),
    # Fresh parameters only; images of other sizes than img_size; another rope_type's.
    **unused(head_init_scale=0.001, dynamic_img_size=False, rope_mrope_section=None),
    **unused(device=None, dtype=None),
}
COORDINATES = {"cat": "index", "dinov3": "centred"}  # rope_type -> rope


def timm_eva(a: Values) -> dict[str, Any]:
    """Fields of a ViT that follow from several arguments of timm's `Eva` at once."""
    pool = POOLS.get(a["global_pool"], a["global_pool"])
    if pool == "token" and not a["class_token"]:
        raise ValueError("global_pool='token' needs class_token=True")
    after = pool == "mean" if a["use_fc_norm"] is None else a["use_fc_norm"]
    before = not after if a["use_post_transformer_norm"] is None else a["use_post_transformer_norm"]
    found = {
        "pool": pool,
        "pool_prefix": pool == "map",  # this class's attention pooling reads all rows
        "final_norm": before,
        "fc_norm": after,
        "embed_class": not a["no_embed_class"],
        "naming": "eva" if a["qkv_fused"] else "eva_unfused",
        "resize": "timm",
    }
    if a["qkv_bias"] and a["attn_type"] == "eva":
        found["qkv_bias"] = "qv"
    if a["use_rot_pos_emb"]:
        found["rope"] = COORDINATES[a["rope_type"]]
        found["rope_layout"] = "halves" if a["rope_rotate_half"] else "pairs"
        found["rope_grid"] = a["ref_feat_shape"] if a["rope_type"] == "cat" else None
    if a["swiglu_mlp"]:
        if pool == "map":
            raise ValueError("global_pool='map' with swiglu_mlp: its pooling has another MLP than the blocks")
        hidden = int(a["embed_dim"] * a["mlp_ratio"])
        split = a["scale_mlp"] or a["swiglu_align_to"]
        hidden += -hidden % (a["swiglu_align_to"] or 1)
        found |= {"activation": "swiglu", "mlp_hidden": 2 * hidden, "mlp_split": bool(split)}
    return found


def _distilled(a: Values) -> dict[str, Any]:
    if a["no_embed_class"]:
        raise ValueError("no_embed_class=True leaves no room for its prefix rows, which it always embeds")
    if a["global_pool"] != "token":
        raise ValueError("its two heads read the class and distillation tokens: global_pool='token'")
    return {**timm_vit(a), "distilled": True}


# DynamicViT, TPS, EViT

DYNAMICVIT = {
    **common.with_defaults(VIT, qkv_bias=True),
    **common.DROPOUT,
    **common.QK_SCALE,
    **NORM_6,
    **REPRESENTATION,
    **HYBRID,
    **unused(attn_drop_rate=0.0),  # its attention never applies it
}


def tps_options(module: Any) -> dict[str, Any] | None:
    """`TPSModule` as options of dTPS: text, or a mapping of its arguments; None for no module."""
    if module is None:
        return None
    given = {"l2_norm": True, "temperature": 1, **common.called(module, "TPSModule")}
    if unknown := given.keys() - {"l2_norm", "temperature"}:
        raise ValueError(f"TPSModule has no argument {min(unknown)!r}")
    measure = "cosine" if flag(given["l2_norm"]) else "dot"
    return {"temperature": float(given["temperature"]), "measure": measure}


TPS = {
    **VIT,
    **common.HEAD_DROPOUT,
    **common.QK_SCALE,
    **common.NORM,
    **common.ACTIVATION,
    "no_embed_class": to("no_embed_class", flag, True),
    "prune_loc": Argument((3, 6, 9)),
    "keep_ratio": Argument(0.7),
    "token_merge_module": Argument(None, tps_options),
    "shuffle_score": Argument(False, flag),
    "block_layers": only("Block", why="its other one loses the residual"),
    "Patch_layer": only("PatchEmbed", why=common.CODE),
    "Attention_block": only("Attention", why=common.CODE),
    "Mlp_block": only("Mlp", why=common.CODE),
    "token_score_head_cls": only("PredictorLG", why="there is no other in its file"),
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
    if a["shuffle_score"]:  # its own code calls a function that it lacks; the study of the paper is meant
        found["shuffle"] = True
    method = "dynamicvit" if merge is None else "dtps"
    return {**found, **common.sites(at, ratios), **(merge or {}), "method": method}


EVIT = {
    **common.with_defaults(VIT, qkv_bias=True),
    **common.DROPOUT,
    **common.ATTN_DROPOUT,
    **NORM_6,
    **common.ACTIVATION,
    **REPRESENTATION,
    "distilled": to("distilled", flag, False),
    "keep_rate": Argument((1,)),
    "fuse_token": Argument(False, flag),
    "embed_layer": only("PatchEmbed", None, why=common.CODE),
    **unused(weight_init=""),
}


def _evit(a: Values, fused: str = "evit", plain: str = "topk") -> dict[str, Any]:
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
    method = fused if a["fuse_token"] else plain
    return {**found, "at": tuple(keep), "keep": tuple(keep.values()), "method": method}


def per_block(rates: Any, depth: int) -> tuple[float, ...]:
    """EViT's `keep_rate` argument as one rate per block."""
    rates = tuple(rates) if isinstance(rates, (list, tuple)) else (rates,)
    rates = rates * depth if len(rates) == 1 else rates
    if len(rates) != depth or not all(0 < rate <= 1 and math.isfinite(rate) for rate in rates):
        raise ValueError(f"keep_rate={rates}: give one rate in (0, 1] per block ({depth}), or a single one")
    return rates


# ATS

ATS = {
    **common.IMAGES,
    "in_channels": to("in_chans", int, 3),
    "patch_size": to("patch_size", per_stage(int), 16),
    **common.with_defaults(BLOCKS, qkv_bias=True),
    **common.USUAL,
    **NORM_6,
    **common.ACTIVATION,
    "ats_blocks": Argument((), common.ints),
    "num_tokens": Argument((), common.ints),
    "drop_tokens": Argument(False, flag),
}
ATS.pop("in_chans")


def _ats(a: Values) -> dict[str, Any]:
    """`num_tokens` has no effect there unless it is too small, which is an error."""
    if not a["ats_blocks"]:
        return {}
    return {"method": "ats", "at": a["ats_blocks"], "keep": 1.0, "compact": a["drop_tokens"]}


# LV-ViT, T2T-ViT, PS-ViT

LVVIT = {
    **common.with_defaults(VIT, drop_path_rate=0.0),
    **common.USUAL,
    **HYBRID,
    # One rate, or with a decay other than "linear" and "fix" one per block.
    "drop_path_rate": to("drop_path", per_stage(float), 0.0),
    "drop_path_decay": Argument("linear"),
    "head_dim": to("head_dim", common.optional(int), None),
    "skip_lam": to("skip_lam", float, 1.0),
    "order": to("order", common.optional(tuple), None),
    "p_emb": Argument("4_2"),
    "mix_token": to("mix_token", flag, False),
    "return_dense": Argument(False, flag),
}
# p_emb -> (stem, its channels); the official classes take any other value for plain patches.
STEMS = {"4_2": ("conv", 64), "4_2_128": ("conv", 128)}


def _lvvit(a: Values, aux_weight: float = 0.5) -> dict[str, Any]:
    stem, channels = STEMS.get(a["p_emb"], ("patch", 64))
    decay = {"linear": "linear", "fix": "constant"}.get(a["drop_path_decay"])
    if (decay is None) != isinstance(a["drop_path_rate"], tuple):
        raise ValueError(
            "drop_path_rate is one number with drop_path_decay 'linear' or 'fix', else one per block"
        )
    if a["mix_token"] and not a["return_dense"]:
        raise ValueError("mix_token=True needs return_dense=True")
    return {
        "depth": a["depth"] if a["order"] is None else len(a["order"]),  # order goes before depth
        "drop_path_rule": decay or "linear",
        "stem": stem,
        "stem_width": channels,
        "aux_weight": aux_weight if a["return_dense"] else None,
    }


def _lvvit_of_dynamicvit(a: Values, aux_weight: float = 0.5) -> dict[str, Any]:
    if not a["return_dense"]:
        raise ValueError("it always calls its auxiliary head: import it with return_dense=True")
    return {**_lvvit(a, aux_weight), "mix_token": False}  # never read


T2T = {
    **common.IMAGES,
    **BLOCKS,
    **common.USUAL,
    "token_dim": to("token_dim", int, 64),
    # "convolution" as its comment says: its own forward pass would have to be changed for it.
    "tokens_type": to("tokens_type", str, "performer"),
}
PSVIT = {
    **common.IMAGES,
    **common.with_defaults(BLOCKS, embed_dim=384, depth=14),
    **common.USUAL,
    "num_iters": to("iterations", int, 4),
    "offset_gamma": to("gamma", float, 0.1),
    "offset_bias": to("offset_bias", flag, False),
    "with_cls_token": to("class_token", flag, False),
    "downsample_ratio": to("downsample_ratio", int, 4),
    "num_point_w": Argument(14, int),
    "num_point_h": Argument(14, int),
    "stem_layer": only(None, why="a stem is code: give its channels as stem=(64, 64, 256, 64)"),
    # In place of stem_layer: channels of the first convolution, inside and after the first
    # bottleneck, inside the second (the builders use 64, 64, 256, 64; in Ti 64, 64, 192, 64).
    "stem": Argument(None, common.optional(common.ints)),
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


# DVT: what its wrappers pass to each exit; sizes may be given to import smaller ones.

WHY_224 = "the token grids of its exits are written for that"


def _dvt(family: str, **defaults: Any) -> dict[str, Argument]:
    return {
        **common.with_defaults(
            {**T2T, "norm_layer": NORM_6["norm_layer"]} if family == "deit" else T2T, **defaults
        ),
        "img_size": to("img_size", only(224, why=WHY_224).convert, 224),
        "feature_reuse": to("feature_reuse", flag, True),
        "relation_reuse": to("relation_reuse", flag, True),
        "family": only(family, why="that is this class's"),
    }


EXITS = {"exits": (7, 10, 14)}
DEIT_S = _dvt("deit", embed_dim=384, num_heads=6, qkv_bias=True)
DVT_DEIT = {name: argument for name, argument in DEIT_S.items() if name not in ("token_dim", "tokens_type")}
PRUNING = unused(pruning_loc=None, token_ratio=None)  # read by `pruned`
PRESET, TIMM = "deit_small_patch16_224", "vit_small_patch16_224"
CLASSES = {
    "timm/VisionTransformer": Official(TIMM, TIMM_VIT, lambda a: {**timm_vit(a), "resize": "timm"}),
    "timm/VisionTransformerDistilled": Official(
        TIMM, TIMM_VIT, lambda a: {**_distilled(a), "resize": "timm"}
    ),
    "timm/Eva": Official(TIMM, EVA, timm_eva),
    # The same classes; its own main.py resizes positions without antialias.
    "deit/VisionTransformer": Official(PRESET, TIMM_VIT, timm_vit),
    "deit/DistilledVisionTransformer": Official(PRESET, TIMM_VIT, _distilled),
    # distill and viz_mode change what is returned, not what is computed.
    "dynamicvit/VisionTransformerDiffPruning": Official(
        PRESET, {**DYNAMICVIT, **PRUNING, **unused(distill=False)}, common.pruned
    ),
    # mse_token is read by its loss.
    "spvit/VisionTransformerDiffPruning": Official(
        PRESET,
        {**DYNAMICVIT, **PRUNING, **unused(distill=False, mse_token=False)},
        lambda a: {**common.pruned(a), "method": "spvit", "fuse": "package_sum"},
    ),
    "dynamicvit/VisionTransformerTeacher": Official(PRESET, DYNAMICVIT),
    "dynamicvit/LVViTDiffPruning": Official(
        "lvvit_s",
        {**LVVIT, **PRUNING, **unused(distill=False, viz_mode=False)},
        lambda a: {**_lvvit_of_dynamicvit(a), **common.pruned(a)},
    ),
    # Its logits are those of the class token alone.
    "dynamicvit/LVViT_Teacher": Official("lvvit_s", LVVIT, lambda a: _lvvit_of_dynamicvit(a, aux_weight=0.0)),
    "tps/DynamicVit": Official(PRESET, TPS, _tps),
    "evit/EViT": Official(PRESET, EVIT, _evit),
    "ats/ViT": Official(PRESET, ATS, _ats),
    # EViT's selection with TPS's squeezing in place of the fused token.
    "evit+tps/EViT": Official(PRESET, EVIT, lambda a: _evit(a, "etps", "etps")),
    "lvvit/LV_ViT": Official("lvvit_s", LVVIT, _lvvit),
    "t2t/T2T_ViT": Official("t2t_vit_14", T2T),
    "psvit/PSViT": Official("psvit_b_14", PSVIT, _psvit),
    "dvt/DVT_Deit_small_model": Official("dvt_deit_small", DVT_DEIT, lambda a: EXITS),
    "dvt/DVT_T2t_vit_12_model": Official(
        "dvt_t2t_vit_12", _dvt("t2t", embed_dim=256, num_heads=4, mlp_ratio=2.0), lambda a: EXITS
    ),
    "dvt/DVT_T2t_vit_14_model": Official(
        "dvt_t2t_vit_14", _dvt("t2t", embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0), lambda a: EXITS
    ),
}
