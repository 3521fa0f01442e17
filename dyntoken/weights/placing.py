"""What to do with arrays that a model has no place for, or a place of another number of channels."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dyntoken.weights.errors import WeightsError, check_not_empty

# Left out without changing what the model is meant to compute: buffers, other heads,
# MAE's decoder, what a reduction method or distillation adds to the dense model.
HARMLESS = re.compile(
    r"(^|\.)(position_ids|n_averaged|dist_token)$"
    r"|^(\w+_token\.|exit_\d+\.)?(heads?|fc|classifier|head_dist|dino_head|ibot_head|decoder\w*)(\.|$)"
    r"|(^|\.)(score_predictor|reducer_\d+|fast_path\w*|fastmlp\w*)\."
)
OF_HEAD = re.compile(r"^(pre_logits|aux_head)\.")
# What has no place -> the keyword of create_model that makes one.
REMEDIES = (
    (
        r"\.(ls[12]\.gamma|gamma_[12]|lambda1|ls[12])$",
        "layer_scale",
        "layer_scale=1e-5 (the weights replace the number)",
    ),
    (r"\.attn\.qkv\.bias$", "qkv_bias", "qkv_bias=True"),
    (r"\.attn\.[qv]_bias$", "qkv_bias", "qkv_bias='qv'"),
    (r"\.attn\.norm\.", "attn_norm", "attn_norm=True"),
    (r"\.mlp\.norm\.", "mlp_norm", "mlp_norm=True"),
    (r"\.mlp\.fc1_[gx]\.", "mlp_split", "activation='swiglu', mlp_split=True"),
    (r"^attn_pool\.", "pool", "pool='map'"),
    (r"^pre_logits\.", "representation_size", "representation_size={rows}"),
    (r"^aux_head\.", "aux_weight", "aux_weight=0.5"),
    (r"^cls_token$", "class_token", "class_token=True"),
    (r"^reg_token$", "registers", "registers={rows}"),
    (r"\.attn\.[qk]_norm\.", "qk_norm", "qk_norm=True"),
    (r"^norm_pre\.", "pre_norm", "pre_norm=True"),
    (r"^fc_norm\.", "fc_norm", "fc_norm=True, final_norm=False and pool='mean' as it was trained"),
    (r"(^|\.)blocks[._](\d+)\.", "depth", "depth={depth} (or name another size)"),
)


def changing(unexpected: Sequence[str], head: str) -> list[str]:
    """The left-over keys without which the model computes something else than the source did."""
    dotted = {key: key.replace("/", ".") for key in unexpected}
    return [
        key
        for key, name in dotted.items()
        if not HARMLESS.search(name) and not (head == "reset" and OF_HEAD.search(name))
    ]


def check_blocks(found: Collection[str], shapes: Collection[str], origin: str) -> None:
    """Raises `WeightsError` where some blocks are there and others are not: weights of another depth."""
    blocks = {hit[0] for path in shapes if (hit := re.match(r".*?blocks_\d+/", path))}
    absent = sorted(block for block in blocks if not any(path.startswith(block) for path in found))
    if absent and len(absent) < len(blocks):
        raise WeightsError(
            f"{origin}: weights of another depth: they hold {len(blocks) - len(absent)} of the model's "
            f"{len(blocks)} blocks ({absent[0].rstrip('/')} is missing); create the model as deep as they are"
        )


def remedy(model: Any, left: Sequence[str], tensors: Mapping[str, np.ndarray]) -> str:
    """How to build the model that takes the arrays `left`, as far as there is one."""
    names = [key.replace("/", ".") for key in left]
    fields = model.backbone.make.__dataclass_fields__.keys() | {"representation_size", "fc_norm", "pool"}
    found = []
    for pattern, field, text in REMEDIES:
        hits = [
            (key, hit) for key, name in zip(left, names, strict=True) if (hit := re.search(pattern, name))
        ]
        if hits and field in fields and not any(field in other for other in found):
            array = tensors[hits[0][0]]
            values = {"rows": array.shape[1] if array.ndim == 3 else len(array)}
            if field == "depth":
                depth = 1 + max(int(hit[2]) for _, hit in hits)
                if depth <= model.backbone.get("depth", 0):
                    continue
                values["depth"] = depth
            found.append(text.format(**values))
    if found:
        return f"create the model with {', '.join(found)}"
    return "check the model's name"


def refuse(model: Any, left: Sequence[str], tensors: Mapping[str, np.ndarray], origin: str) -> None:
    """Raises `WeightsError` for left-over arrays that change what is computed."""
    if left:
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        raise WeightsError(
            f"{origin}: the model has no place for {len(left)} arrays that change what it computes ({shown}): "
            f"{remedy(model, left, tensors)}, or leave them out with unexpected='ignore'"
        )


def other_channels(
    found: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], channels: int
) -> dict[str, int]:
    """Kernels of the stem that only differ in the image's channels: path to the source's number."""
    paths = {}
    for path, value in found.items():
        want = shapes[path]
        if value.ndim == 4 == len(want) and want[2] == channels != value.shape[2]:
            others = [n for axis, n in enumerate(value.shape) if axis != 2]
            if others == [want[0], want[1], want[3]]:
                paths[path] = value.shape[2]
    return paths


def adapted(kernel: np.ndarray, channels: int, origin: str) -> np.ndarray:
    """A stem's kernel `[h, w, c, out]` for images of another number of channels.

    As timm's `adapt_input_conv`: to one channel, the sum over channels; to n, the
    channels repeated in turn and scaled by c / n, which keeps the size of what comes out.
    """
    old = kernel.shape[2]
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    if old not in (1, 3):
        raise WeightsError(f"{origin}: in_chans='adapt' goes from 1 or 3 channels, the weights have {old}")
    return kernel[:, :, np.arange(channels) % old] * np.float32(old / channels)


def of_head(path: str) -> bool:
    """Whether a parameter belongs to a classifier; a cascade has one per exit."""
    return re.search(r"(^|/)(head/(?!norm/)|aux_head/)", path) is not None


def check_shapes(
    found: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], origin: str, channels: int
) -> None:
    """Refuses arrays of another shape or kind than the model's, with the remedy."""
    whole = next((path for path, value in found.items() if value.dtype.kind in "iub"), None)
    if whole:
        raise WeightsError(
            f"{origin}: {whole} holds {found[whole].dtype}, quantised weights are not read: save them in float32"
        )
    check_not_empty(found, origin)
    wrong = [path for path, value in found.items() if tuple(value.shape) != tuple(shapes[path])]
    if not wrong:
        return
    listed = ", ".join(f"{p} {list(found[p].shape)} (model: {list(shapes[p])})" for p in wrong[:4])
    listed += f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    heads = [path for path in wrong if of_head(path)]
    stems = other_channels({path: found[path] for path in wrong}, shapes, channels)
    remedies = []
    if stems:
        old = next(iter(stems.values()))
        remedies.append(
            f"pass in_chans='adapt' to sum or repeat them, or create the model with in_chans={old}"
        )
    if heads:
        head = found[next((path for path in heads if path.endswith("kernel")), heads[0])]
        fitting = f", or create the model with num_classes={head.shape[-1]}" if head.ndim else ""
        remedies.append(f"pass head='reset' for a new classifier{fitting}")
    if len(stems) + len(heads) < len(wrong):
        remedies = [
            "create the model with the sizes of the weights (its name, img_size, patch_size, in_chans, width)"
        ]
    remedy = "; ".join(remedies)
    raise WeightsError(f"{origin}: weights of another shape: {listed}; {remedy}")


def check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """Refuses a keyword's value that is none of its choices."""
    if value not in choices:
        raise WeightsError(f"{name}={value!r}: choose {' or '.join(map(repr, choices))}")
