"""Official classes whose method takes part in every block, argument by argument, as in `official_isotropic`."""

from __future__ import annotations

from typing import Any

from dyntoken.weights import constructors as common
from dyntoken.weights.constructors import Argument, Official, Values, flag, only, unused
from dyntoken.weights.official_isotropic import HYBRID, NORM_6, PRESET, REPRESENTATION, VIT, per_block

DEIT = {
    **common.with_defaults(VIT, qkv_bias=True),
    **common.DROPOUT,
    **common.ATTN_DROPOUT,
    **common.QK_SCALE,
    **NORM_6,
    **REPRESENTATION,
    **HYBRID,
}
# Evo-ViT

EVOVIT = {
    **DEIT,
    "depth": common.to("depth", only(12, why="its own code counts to 12").convert, 12),
    "tradeoff": Argument(None),
    "prune_ratio": Argument(None),
    "prunecls": Argument(False, flag),
    "distilled": only(False, why="its own code cannot build it"),
    # No argument there: an attribute that is True until someone changes it.
    "stage_wise_prune": Argument(True, flag),
}
STAGES = (4, 8)


def _evovit(a: Values) -> dict[str, Any]:
    ratios = per_block(a["prune_ratio"] or [1.0] * 4 + [0.5] * 8, a["depth"])
    at = STAGES if a["stage_wise_prune"] else tuple(i for i, r in enumerate(ratios) if r != 1)
    return {
        "method": "evovit",
        "at": at,
        "keep": tuple(float(ratios[index]) for index in at),
        "tradeoff": tuple(map(float, per_block(a["tradeoff"] or [1.0] * 4 + [0.5] * 8, a["depth"]))),
        "put_back": not (a["prunecls"] and a["stage_wise_prune"]),
        "pool": "mean",
        "final_norm": False,
        "fc_norm": True,
        "token_head": True,
    }


# A-ViT

AVIT = {**DEIT, "args": Argument(None), "distilled": only(False, why="its halting counts one prefix row")}


def _avit(a: Values) -> dict[str, Any]:
    given = dict(a["args"] or {})
    if given.get("act_mode", 4) != 4:
        raise ValueError("args: only act_mode=4 is implemented: its other modes are not in the paper")
    scale, center = given.get("gate_scale", 10.0), given.get("gate_center", 30.0)
    return {"method": "avit", "gate_scale": float(scale), "gate_center": float(center)}


# AdaViT: the arguments of its class, and those its script hands on to it.

ADAVIT = {
    **DEIT,
    "use_t2t": only(False, why="its T2T stem has its own keys"),
    "ada_head": Argument(False, flag),
    "ada_layer": Argument(False, flag),
    "ada_token": Argument(False, flag),
    "ada_token_with_mlp": Argument(False, flag),
    "ada_head_v2": only(False, why="it masks hidden units of the MLP by head"),
    "ada_token_detach_attn": only(True, why="its other form lets a gradient through -inf"),
    "ada_token_start_layer": common.to("token_start", int, 0),
    "keep_layers": common.to("keep_blocks", int, 1),
    "norm_policy": only(False, why="no published model has it"),
    "head_select_tau": Argument(5.0, float),
    "layer_select_tau": Argument(5.0, float),
    "token_select_tau": Argument(5.0, float),
}


def _adavit(a: Values) -> dict[str, Any]:
    taus = {a[f"{part}_select_tau"] for part in ("head", "layer", "token")}
    if len(taus) > 1:
        raise ValueError(f"one temperature for all decisions is implemented, not {sorted(taus)}")
    parts = {f"choose_{part}s": a[f"ada_{part}"] for part in ("head", "layer", "token")}
    if not any(parts.values()):
        return {}
    return {
        "method": "adavit",
        **parts,
        "token_mlp": a["ada_token_with_mlp"],
        "tau": taus.pop(),
        "reference": True,
    }


# LTMP: its masks are trained by one class and used by the other; the arguments of the loss stay with it.

LTMP_CLASSES = ("LTMPVisionTransformer", "InferenceLTMPVisionTransformer")
LTMP = {
    **DEIT,
    "tau": common.to("tau", float, 0.1),
    **unused(reduction_target=None, reg_scale=None),
}


def _ltmp(a: Values) -> dict[str, Any]:
    return {"method": "ltmp"}


CLASSES = {
    "adavit/AdaStepT2T_ViT": Official(PRESET, ADAVIT, _adavit),
    "avit/VisionTransformer": Official(PRESET, AVIT, _avit),
    "evovit/EvoVisionTransformer": Official(PRESET, EVOVIT, _evovit),
    **{f"ltmp/{name}": Official(PRESET, LTMP, _ltmp) for name in LTMP_CLASSES},
}
