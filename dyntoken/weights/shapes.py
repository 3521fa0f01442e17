"""Which vision transformer an array's names and shapes belong to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dyntoken import architectures
from dyntoken.weights import keys
from dyntoken.weights.errors import WeightsError, check_not_empty
from dyntoken.weights.files import Bundle

PATCHES = "patch_embed.proj.weight"
BLOCK = "blocks.0."
# Widths whose heads are not of 64 channels in the published models.
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
PREFIX = ("cls_token", "dist_token", "reg_token")
# Dimensions of the arrays whose shapes are read.
DIMENSIONS = {PATCHES: 4, "pos_embed": 3, "pre_logits.fc.weight": 2, f"{BLOCK}attn.q_norm.weight": 1}
DIMENSIONS |= dict.fromkeys(PREFIX, 3)
DIMENSIONS |= {f"{BLOCK}{name}.weight": 2 for name in ("attn.proj", "mlp.fc1", "mlp.fc2", "mlp.fc1_g")}
Grid = tuple[int, int]


def in_timm_keys(bundle: Bundle, prefer: str) -> dict[str, np.ndarray]:
    """The arrays of a vision transformer under timm's names, wrappers' prefixes taken off; {} of anything else."""
    tensors = bundle.tensors
    if bundle.own:
        return _from_own(tensors)
    roots = {key.removesuffix(PATCHES) for key in tensors if key.endswith(PATCHES)}
    roots = {root for root in roots if any(key.startswith(f"{root}{BLOCK}") for key in tensors)}
    if not roots:
        return {}
    averaged = [root for root in roots if ("ema" in root or "teacher" in root) == (prefer == "ema")]
    root = "" if "" in roots else min(averaged or roots, key=len)
    inside = {key.removeprefix(root): value for key, value in tensors.items() if key.startswith(root)}
    heads = {
        key: value for key, value in tensors.items() if re.fullmatch(r"(head|head_dist)\.(weight|bias)", key)
    }
    return {**heads, **inside}


def _from_own(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for path, value in tensors.items():
        try:
            key = keys.reference_key(path, keys.VIT_RULES)
        except ValueError:
            return {}
        found[key] = keys.Entry(path, key, keys.axis_order(path, value.shape, "/relation/")).to_reference(
            value
        )
    return found if PATCHES in found and any(key.startswith(BLOCK) for key in found) else {}


def fields_of(
    tensors: Mapping[str, np.ndarray], grid: Grid | None, origin: str
) -> tuple[dict[str, Any], list[str]]:
    """Keywords of `create_model` by the arrays, and in words what had to be assumed.

    Args:
      tensors: under timm's names.
      grid: (rows, columns) of the patches where something else says so.
      origin: the source, for messages.

    Raises:
      WeightsError: position embeddings of no grid, an empty array, one of other dimensions.
    """
    known = {key: value for key, value in tensors.items() if key in DIMENSIONS}
    check_not_empty(known, origin)
    for key, value in known.items():
        if value.ndim != DIMENSIONS[key]:
            raise WeightsError(
                f"{origin}: its {key} has shape {list(value.shape)}, a vision transformer's {DIMENSIONS[key]} "
                "dimensions: reshape it, or look whether the file is whole"
            )
    width, channels, *patch = tensors[PATCHES].shape
    depth = 1 + max(int(hit[1]) for key in tensors if (hit := re.match(r"blocks\.(\d+)\.", key)))
    of_block = {key.removeprefix(BLOCK): value for key, value in tensors.items() if key.startswith(BLOCK)}
    fields: dict[str, Any] = {"width": width, "depth": depth, "in_chans": channels, "stem": "patch"}
    fields["patch_size"] = patch[0] if patch[0] == patch[1] else tuple(patch)
    assumed: list[str] = []
    fields |= _attention(of_block, width, assumed) | _mlp(of_block, width)
    rows = {name: tensors[name].shape[1] for name in PREFIX if name in tensors}
    fields |= {
        "class_token": "cls_token" in rows,
        "distilled": "dist_token" in rows,
        "registers": rows.get("reg_token", 0),
        "pre_norm": "norm_pre.weight" in tensors,
        "final_norm": "norm.weight" in tensors,
        "fc_norm": "fc_norm.weight" in tensors,
    }
    fields |= _positions(tensors.get("pos_embed"), sum(rows.values()), grid, patch, origin)
    fields |= _head(tensors, width, bool(rows.get("cls_token")), fields["fc_norm"])
    fields |= _rotary(fields)
    return fields, assumed


def _rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """DINOv3 has rotary positions alone; EVA-02 has both, biases of queries and values, and a gate."""
    if not fields["position"]:
        return {"rope": "centred", "rope_layout": "halves", "naming": "eva"}
    if fields["qkv_bias"] == "qv" and fields.get("activation") == "swiglu":
        return {"rope": "index", "rope_layout": "pairs", "naming": "eva"}
    return {"rope": None, "naming": "vit"}


def family_of(fields: Mapping[str, Any]) -> str:
    """Row of `FAMILIES` that a model of these fields most likely belongs to."""
    if fields["rope"]:
        return {"centred": "dinov3", "index": "eva02"}[fields["rope"]]
    if fields["pre_norm"] or fields["pool"] == "map":
        return "clip" if fields["pre_norm"] else "siglip"
    if fields["layer_scale"] is None or fields["distilled"]:
        return "deit"
    return "dinov2" if fields["embed_class"] or fields["registers"] else "deit3"


# Names of each family, and one for sizes that none of them has; what a name stands for is replaced by
# what the arrays say, but for the preprocessing.
FAMILIES = {
    "vit": ("vit_{size}_patch{patch}_{pixels}", "vit_small_patch16_224"),
    "deit": ("deit_{size}{distilled}_patch{patch}_{pixels}", "deit_small_patch16_224"),
    "deit3": ("deit3_{size}_patch{patch}_{pixels}", "deit3_small_patch16_224"),
    "clip": ("vit_{size}_patch{patch}_clip_{pixels}", "vit_base_patch16_clip_224"),
    "siglip": ("vit_{size}_patch{patch}_siglip_{pixels}", "vit_base_patch16_siglip_224"),
    "dinov2": ("vit_{size}_patch{patch}{registers}_dinov2", "vit_small_patch14_dinov2"),
    "dinov3": ("vit_{size}_patch{patch}_dinov3_qkvb", "vit_small_patch16_dinov3_qkvb"),
    "eva02": ("eva02_{size}_patch{patch}_{pixels}", "eva02_small_patch14_224"),
}
SIZED = ("width", "depth", "patch_size")
SIZES = {  # width and depth of the published models
    (192, 12): "tiny",
    (384, 12): "small",
    (512, 12): "medium",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
    (1408, 40): "giant",
    (1536, 40): "giant",
    (1152, 27): "so400m",
}


def name_of(family: str, fields: Mapping[str, Any]) -> str:
    """The name of a model of these sizes, or its family's for other sizes."""
    pattern, usual = FAMILIES[family]
    name = pattern.format(
        size=SIZES.get((fields["width"], fields["depth"])),
        patch=fields["patch_size"],
        pixels=fields.get("img_size"),
        distilled="_distilled" if fields["distilled"] else "",
        registers="_reg4" if fields["registers"] else "",
    )
    arch = architectures.parse(name)
    return name if arch is not None and arch.options["heads"] == fields["heads"] else usual


def published(bundle: Bundle, prefer: str) -> str | None:
    """The known architecture whose family and sizes a source's arrays have; None if there is none."""
    tensors = in_timm_keys(bundle, prefer)
    if not tensors:
        return None
    try:
        fields, _ = fields_of(tensors, None, bundle.origin)
    except (ValueError, LookupError):  # arrays of odd shapes
        return None
    name = name_of((bundle.layout.family if bundle.layout else "") or family_of(fields), fields)
    usual = architectures.get(name).options  # of another size, where no name has these
    return name if all(usual.get(key) == fields[key] for key in SIZED) else None


def fits(model: Any, name: str) -> bool:
    """Whether a model has the sizes of an architecture."""
    usual = architectures.get(name).options
    return all(usual.get(key) == model.backbone.get(key) for key in SIZED)


def _attention(of_block: Mapping[str, np.ndarray], width: int, assumed: list[str]) -> dict[str, Any]:
    inner = of_block["attn.proj.weight"].shape[1] if "attn.proj.weight" in of_block else width
    norm = of_block.get("attn.q_norm.weight")
    fields: dict[str, Any] = {
        "qkv_bias": "qv" if "attn.q_bias" in of_block else "attn.qkv.bias" in of_block,
        "proj_bias": "attn.proj.bias" in of_block,
        "qk_norm": norm is not None,
        "attn_norm": "attn.norm.weight" in of_block,
        "mlp_norm": "mlp.norm.weight" in of_block,
        "layer_scale": 1e-5 if {"ls1.gamma", "gamma_1"} & of_block.keys() else None,
    }
    if norm is not None:
        fields["heads"] = inner // len(norm)
    else:
        fields["heads"] = HEADS.get(width) or max(1, inner // 64)
        assumed.append("heads")
    if inner != width:
        fields["head_dim"] = inner // fields["heads"]
    return fields


def _mlp(of_block: Mapping[str, np.ndarray], width: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"mlp_hidden": None, "mlp_split": False}
    if (gate := of_block.get("mlp.fc1_g.weight")) is not None:
        return {"activation": "swiglu", "mlp_hidden": 2 * len(gate), "mlp_split": True}
    if {"mlp.fc1.weight", "mlp.fc2.weight"} <= of_block.keys():
        hidden, read = len(of_block["mlp.fc1.weight"]), of_block["mlp.fc2.weight"].shape[1]
        fields |= {
            "mlp_ratio": ratio(hidden, width),
            **({"activation": "swiglu"} if hidden == 2 * read else {}),
        }
    return fields


def ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` that makes exactly so many channels."""
    value = hidden / width
    return value if int(width * value) == hidden else math.nextafter(value, math.inf)


def _positions(
    embedding: np.ndarray | None, prefix: int, grid: Grid | None, patch: list[int], origin: str
) -> dict[str, Any]:
    if embedding is None:
        return {"position": False, "embed_class": True}
    for first in (prefix, 0):
        count = embedding.shape[1] - first
        side = math.isqrt(max(count, 0))
        rows, columns = grid or (side, side)
        if 0 < rows * columns == count:
            size = (rows * patch[0], columns * patch[1])
            where = {"img_size": size[0] if size[0] == size[1] else size}
            return where | {"position": True, "embed_class": not prefix or bool(first)}
    raise WeightsError(
        f"{origin}: pos_embed has {embedding.shape[1]} rows, which with {prefix} prefix tokens make no square grid; "
        "pass source_grid=(rows, columns)"
    )


def _head(tensors: Mapping[str, np.ndarray], width: int, token: bool, fc_norm: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"num_classes": 0, "pool": "token" if token and not fc_norm else "mean"}
    if "attn_pool.latent" in tensors:
        fields["pool"] = "map"
    if (before := tensors.get("pre_logits.fc.weight")) is not None:
        fields["representation_size"] = len(before)
    if (head := tensors.get("head.weight")) is not None and head.ndim == 2:
        fields["num_classes"] = len(head)
        if head.shape[1] == 2 * width and before is None:
            fields["pool"] = "token_mean"
    return fields
