"""Whose names a source's arrays bear: shared prefixes, Google's flax ViT, other libraries' (see `foreign`)."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dyntoken.weights import files, foreign
from dyntoken.weights.errors import WeightsError
from dyntoken.weights.files import Bundle
from dyntoken.weights.keys import KeyMap

AVERAGED = re.compile(r"ema|averag|teacher|swa", re.IGNORECASE)
# Layouts by keys that only they have, to name a source that does not fit or lacks its marks in `foreign`.
OTHERS = (
    (
        r"(^|\.)encoder\.layer\.\d+\.(attention\.attention\.query|layernorm_before)\.",
        "Hugging Face's ViT layout",
    ),
    (
        r"(^|\.)encoder\.layer\.\d+\.(layer_scale\d|norm\d|attention\.q_proj)\.",
        "Hugging Face's DINOv2 layout",
    ),
    (r"(^|\.)layers?\.\d+\.(attention\.[qkvo]_proj|layer_scale\d)\.", "Hugging Face's ViT layout"),
    (r"(^|\.)encoder\.layers\.\d+\.self_attn\.", "Hugging Face's CLIP or SigLIP layout"),
    (r"(^|\.)resblocks\.\d+\.", "OpenAI's CLIP layout"),
    (r"(^|\.)encoder\.layers\.encoder_layer_\d+\.", "torchvision's ViT layout"),
    (r"(^|\.)blocks\.\d+\.attn\.(q_bias|q_proj)", "timm's EVA-02 or DINOv3 layout"),
    (r"(^|\.)layer[1-4]\.\d+\.conv1\.", "a ResNet's layout"),
    (r"(^|\.)backbone/trunk/|^backbone/stage_", "this library's own layout"),
    (r"(^|\.)blocks\.\d+\.attn\.qkv\.", "timm's ViT layout"),
)
QKV_PARTS = re.compile(r"(.*\battn)\.([qkv])_proj\.(weight|bias)")
FLAX_NOTE = "Google's flax ViT: trained on pixels in [-1, 1] (mean = std = 0.5) and with tanh GELU"
ENCODER = re.compile(r"(.*?)Transformer/encoderblock(?:_(\d+))?/(.*)")
NORMS, MLPS = {"0": "norm1", "1": "norm2", "2": "norm2"}, {"0": "fc1", "1": "fc2"}


def read(source: Any, prefer: str = "ema", step: int | str = "newest") -> Bundle:
    """As `files.read`, with the names of other libraries translated to timm's."""
    return fused(foreign.translated(from_flax_vit(files.read(source, prefer, step))))


def described(bundle: Bundle) -> str | None:
    """For messages: the layout that some of a source's keys belong to, in words; None if unknown."""
    if bundle.layout is not None:
        return bundle.layout.words
    names = list(bundle.tensors)
    return next((layout for pattern, layout in OTHERS if any(re.search(pattern, n) for n in names)), None)


def without_prefix(bundle: Bundle, maps: Sequence[KeyMap], prefer: str) -> Bundle:
    """The source without the prefix that trainers and wrappers put before a model's keys.

    `module.`, `_orig_mod.`, `model.`, `backbone.` and the like need no list: it is
    the one under which most keys are the model's. Where several fit equally,
    `prefer` chooses between an average (or a teacher) and what was trained.

    Args:
      bundle: a source in a reference's key names.
      maps: key maps to try in turn.
      prefer: "ema" or "params".

    Raises:
      WeightsError: the model is there several times.
    """
    for key_map in maps:
        counts = collections.Counter(p for key in bundle.tensors for p in _prefixes(key, key_map))
        most = max(counts.values(), default=0)
        best = [prefix for prefix, count in counts.items() if count == most]
        if 2 * most < len(key_map.entries):
            continue
        if "" in best:
            return bundle
        if len(best) > 1:
            kept = [p for p in best if bool(AVERAGED.search(p)) == (prefer == "ema")]
            if len(kept) != 1:
                raise WeightsError(
                    f"{bundle.origin}: holds the model {len(best)} times, under {', '.join(best)}: "
                    "give the arrays of one as a mapping"
                )
            best = kept
        return _stripped(bundle, best[0], key_map)
    return bundle


def _prefixes(key: str, key_map: KeyMap) -> list[str]:
    parts = key.split(".")
    return [
        "".join(f"{part}." for part in parts[:at])
        for at in range(len(parts))
        if key_map.find(".".join(parts[at:]))
    ]


def _stripped(bundle: Bundle, prefix: str, key_map: KeyMap) -> Bundle:
    inside = {k.removeprefix(prefix): v for k, v in bundle.tensors.items() if k.startswith(prefix)}
    outside = [key for key in bundle.tensors if not key.startswith(prefix)]
    heads = {key: bundle.tensors[key] for key in outside if key not in inside and key_map.find(key)}
    note = f"prefix {prefix!r} of {len(inside)} keys taken off"
    if left := [key for key in outside if key not in heads]:
        note += f"; {len(left)} others left out ({', '.join(left[:3])}{', ...' if len(left) > 3 else ''})"
    return dataclasses.replace(bundle, tensors={**heads, **inside}, notes=(*bundle.notes, note))


def fused(bundle: Bundle) -> Bundle:
    """The source with separate query, key and value layers joined, as timm's `attn.qkv` holds them.

    Where queries and values alone have a bias (EVA-02), these become `q_bias` and `v_bias`.
    """
    if bundle.own:
        return bundle
    hits = {key: hit for key in bundle.tensors if (hit := QKV_PARTS.fullmatch(key))}
    if not hits:
        return bundle
    found = {key: value for key, value in bundle.tensors.items() if key not in hits}
    of: dict[tuple[str, str], dict[str, np.ndarray]] = collections.defaultdict(dict)
    for key, hit in hits.items():
        of[hit[1], hit[3]][hit[2]] = bundle.tensors[key]
    for (layer, leaf), parts in of.items():
        if len(parts) == 3:
            found[f"{layer}.qkv.{leaf}"] = np.concatenate([parts[name] for name in "qkv"])
        else:
            names = "{}_bias" if leaf == "bias" else f"{{}}_proj.{leaf}"
            found |= {f"{layer}.{names.format(name)}": part for name, part in parts.items()}
    return dataclasses.replace(bundle, tensors=found)


def from_flax_vit(bundle: Bundle) -> Bundle:
    """AugReg's and big_vision's flax ViT under timm's keys and in its layouts; any other source as it is.

    Both spell a block `Transformer/encoderblock_0/...`; big_vision numbers its parts
    otherwise, and may stack all blocks in one array. What has no counterpart keeps its name.
    """
    flat = bundle.tensors
    root = next((found[1] for key in flat if (found := ENCODER.fullmatch(key))), None)
    if root is None:
        return bundle
    result: dict[str, np.ndarray] = {}
    qkv: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    for key, value in flat.items():
        if not key.startswith(root):
            continue  # the optimiser's state and counters
        block = ENCODER.fullmatch(key)
        if block is None:
            name = _flax_name(key.removeprefix(root))
            result[name] = _torch_layout(value)
            continue
        for index, part in [(block[2], value)] if block[2] else enumerate(value):
            name, part = _of_block(block[3], part)
            where = qkv[f"blocks.{index}.attn.qkv"] if name[:4] in ("quer", "key.", "valu") else result
            where[name if where is not result else f"blocks.{index}.{name}"] = part
    for name, parts in qkv.items():
        for leaf in ("weight", "bias"):
            three = [
                parts[f"{part}.{leaf}"] for part in ("query", "key", "value") if f"{part}.{leaf}" in parts
            ]
            if three:
                result[f"{name}.{leaf}"] = np.concatenate(three)
    return dataclasses.replace(bundle, tensors=result, own=False, notes=(*bundle.notes, FLAX_NOTE))


def _flax_name(key: str) -> str:
    *parents, leaf = key.split("/")
    parent = parents[-1] if parents else ""
    renamed = {
        "embedding": "patch_embed.proj",
        "encoder_norm": "norm",
        "head": "head",
        "pre_logits": "pre_logits.fc",
    }
    if parent in renamed and leaf in ("kernel", "scale", "bias"):
        return f"{renamed[parent]}.{'bias' if leaf == 'bias' else 'weight'}"
    return {"cls": "cls_token", "pos_embedding": "pos_embed"}.get(leaf, key)


def _of_block(key: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and array of one part of a block; query, key and value keep theirs."""
    *parents, leaf = key.split("/")
    kind = "bias" if leaf == "bias" else "weight"
    if parents[0].startswith("LayerNorm_"):
        return f"{NORMS[parents[0][-1]]}.{kind}", value
    if parents[0].startswith("MlpBlock_"):
        return f"mlp.{MLPS[parents[1][-1]]}.{kind}", _torch_layout(value)
    if parents[1] == "out":  # [heads, head size, C]
        return f"attn.proj.{kind}", value if kind == "bias" else value.reshape(-1, value.shape[-1]).T
    return f"{parents[1]}.{kind}", value.reshape(-1) if kind == "bias" else value.reshape(len(value), -1).T


def _torch_layout(value: np.ndarray) -> np.ndarray:
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T if value.ndim == 2 else value
