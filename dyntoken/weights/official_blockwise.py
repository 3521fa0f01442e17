"""Official classes whose method takes part in every block, argument by argument, as in `official_isotropic`."""

from __future__ import annotations

from typing import Any

from dyntoken.weights import constructors as common
from dyntoken.weights.constructors import Argument, Official, Values, flag, only
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


CLASSES = {
    "evovit/EvoVisionTransformer": Official(PRESET, EVOVIT, _evovit),
}
