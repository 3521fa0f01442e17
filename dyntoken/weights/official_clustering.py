"""The clustering classes of the survey's repository, argument by argument, as in `official_isotropic`.

Their own arguments lie in one namespace, `args`, given as a mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dyntoken.registry import suggest
from dyntoken.weights import constructors as common
from dyntoken.weights.constructors import Argument, Official, Values, flag, only, unused
from dyntoken.weights.official_isotropic import NORM_6, PRESET, REPRESENTATION, VIT

VIT_ARGS = {
    **common.with_defaults(VIT, qkv_bias=True),
    **common.DROPOUT,
    **common.ATTN_DROPOUT,
    **NORM_6,
    **common.ACTIVATION,
    **REPRESENTATION,
    "distilled": only(False, why="it classifies by the class token alone"),
    "embed_layer": only("PatchEmbed", None, why=common.CODE),
    **unused(weight_init=""),
}
# Of every class; viz_mode changes what is returned, not what is computed.
SHARED = ("reduction_loc", "keep_rate", "viz_mode")
DENSE = {"reduction_loc": (), "keep_rate": 1.0}  # a namespace that reduces nothing


def _weighted(value: Any) -> dict[str, Any]:
    if flag(value):
        raise ValueError("equal_weight=True starts at a random row: import it with equal_weight=False")
    return {}


def _row(method: str, **own: Callable[[Any], dict[str, Any]]) -> Official:
    """A class: `own` takes each further argument of its namespace to our fields."""

    def convert(given: Any) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            raise ValueError("give its namespace as a mapping")
        for name in given:
            if name not in (*SHARED, *own):
                raise ValueError(f"it has no {name!r}: {suggest(name, [*SHARED, *own])}")
        needed = ("reduction_loc", "keep_rate", *own) if given.get("reduction_loc", True) else DENSE
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        fields = {"at": common.ints(given["reduction_loc"]), "keep": _kept(given["keep_rate"])}
        for name in own.keys() & given.keys():
            fields.update(own[name](given[name]))
        return fields

    def more(a: Values) -> dict[str, Any]:
        fields = dict(a["args"])
        if not fields["at"]:
            return {}
        keep = fields["keep"]
        if isinstance(keep, float):  # one rate, and its powers, of the first patches
            fields["keep"] = tuple(keep ** (stage + 1) for stage in range(len(fields["at"])))
        return {**fields, "method": method}

    return Official(PRESET, {**VIT_ARGS, "args": Argument(DENSE, convert)}, more)


def _kept(value: Any) -> float | tuple[int, ...]:
    """`keep_rate`: one rate, or a count per stage."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) == 1:
        return float(values[0])
    if any(int(count) != count for count in values):
        raise ValueError("keep_rate is one rate, or a count of tokens per stage")
    return common.ints(values)


def _field(name: str, convert: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {name: convert(value)}


ITERATIONS = {"cluster_iters": _field("iterations", int)}
CLASSES = {
    "tokenreduction/DPCKNNVisionTransformer": _row(
        "dpcknn", k_neighbors=_field("k_neighbors", int), equal_weight=_field("equal_weight", flag)
    ),
    "tokenreduction/KMedoidsVisionTransformer": _row(
        "kmedoids", **ITERATIONS, equal_weight=lambda value: {**_weighted(value), "reference": True}
    ),
    "tokenreduction/SinkhornVisionTransformer": _row(
        "sinkhorn", **ITERATIONS, sinkhorn_eps=_field("epsilon", float)
    ),
    "tokenreduction/PatchMergerVisionTransformer": _row("patchmerger"),
    "tokenreduction/SelfSlimmedVisionTransformer": _row("sit"),
}
