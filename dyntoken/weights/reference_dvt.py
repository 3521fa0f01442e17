"""DVT (blackfeather-wang/Dynamic-Vision-Transformer): constructor arguments, stored thresholds and curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dyntoken.models import create_model
from dyntoken.weights import files
from dyntoken.weights.files import WeightsError
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


@dataclasses.dataclass(frozen=True)
class StoredExits:
    """What an official checkpoint says about its exits; M points of a curve, E exits.

    Attributes:
      gmacs: cost of leaving at each exit, in 1e9 multiply-adds, `[E]`.
      anytime: top-1 fraction of each exit, `[E]`.
      thresholds: of the confidence rule, float32 `[M, E]`; an image leaves at
        the first exit whose largest softmax probability reaches its threshold.
      cost, accuracy: average cost in 1e9 and top-1 fraction at each of these
        sets of thresholds on the ImageNet validation set, `[M]`.
    """

    gmacs: np.ndarray
    anytime: np.ndarray
    thresholds: np.ndarray
    cost: np.ndarray
    accuracy: np.ndarray


def stored_exits(source: Any) -> StoredExits:
    """Thresholds and curves of an official DVT checkpoint.

    Args:
      source: as `load_weights` takes it: a `.pth.tar` file, or a converted
        `.safetensors` or `.npz`, or a mapping, with the keys `flops`,
        `anytime_classification`, `dynamic_threshold` and
        `budgeted_batch_classification` (two rows, cost and accuracy).

    Raises:
      WeightsError: unreadable source, keys that are missing, or values of
        shapes that do not fit one another.
    """
    tree, _, origin = files.read_tree(source)
    missing = [key for key in files.DVT_RESULTS if key not in tree]
    if missing:
        raise WeightsError(f"{origin}: no stored thresholds and curves of DVT: lacks {', '.join(missing)}")
    found = [_numbers(origin, key, tree[key]) for key in files.DVT_RESULTS]
    gmacs, anytime, limits, curve = found
    exits, points = gmacs.size, len(limits) if limits.ndim == 2 else 0
    shapes = ((exits,), (exits,), (points, exits), (2, points))
    for key, value, shape in zip(files.DVT_RESULTS, found, shapes, strict=True):
        if value.shape != shape or not value.size:
            raise WeightsError(
                f"{origin}: {key} has shape {list(value.shape)}, {exits} exits and {points} points "
                f"need {list(shape)}"
            )
    # Accuracies are in per cent there.
    return StoredExits(gmacs, anytime / 100, limits.astype(np.float32), curve[0], curve[1] / 100)


def _numbers(origin: str, key: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{origin}: {key} holds no regular table of numbers") from error
    if not np.isfinite(array).all():
        raise WeightsError(f"{origin}: {key} holds NaN or infinite values")
    return array
