"""What the JSON beside a checkpoint says of its architecture: transformers' and timm's `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dyntoken import architectures
from dyntoken.registry import suggest
from dyntoken.weights import official_isotropic
from dyntoken.weights.errors import WeightsError

FILE = "config.json"
# transformers' names of activations -> ours.
ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(
        ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"
    ),
    **{name: name for name in ("quick_gelu", "relu", "relu6", "silu", "mish", "sigmoid", "tanh")},
    "swish": "silu",
    "linear": "identity",
    "leaky_relu": "leaky_relu",
}
# model_type -> what its configuration class takes where the file is silent.
DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "image_size": 224, "num_attention_heads": 12},
    "dinov2": {"layer_norm_eps": 1e-6, "hidden_act": "gelu", "image_size": 224, "num_attention_heads": 12},
    "siglip_vision_model": {
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "image_size": 224,
        "num_attention_heads": 12,
    },
    "clip_vision_model": {
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
        "image_size": 224,
        "num_attention_heads": 12,
    },
    "dinov3_vit": {
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "image_size": 224,
        "num_attention_heads": 6,
        "rope_theta": 100.0,
    },
}
DEFAULTS |= {
    "deit": DEFAULTS["vit"],
    "vit_mae": DEFAULTS["vit"],
    "vit_msn": DEFAULTS["vit"] | {"layer_norm_eps": 1e-6},
    "dinov2_with_registers": DEFAULTS["dinov2"],
}
# timm's models whose arrays are named as any ViT's and whose blocks compute something else.
TIMM_UNREAD = {"rpn": "norms behind the two branches of a block (ResPostBlock)"}
WHOLE = {
    "siglip": "siglip_vision_model",
    "clip": "clip_vision_model",
}  # two towers, this one under vision_config


def beside(path: Any, name: str = FILE) -> dict[str, Any]:
    """A JSON object beside a weight file, {} where there is none.

    Raises:
      WeightsError: no JSON object.
    """
    file = path.with_name(name)
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (ValueError, OSError) as error:
        raise WeightsError(f"{file}: cannot be read ({error}); repair it or move it away") from error
    return found


def fields_of(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Keywords of `create_model` that a `config.json` settles and the arrays do not; {} of an empty one.

    "arch" among them is the name of a model of ours, where timm's has one; "family" a row of `shapes.FAMILIES`.

    Raises:
      WeightsError: a kind of model that is not read.
    """
    if "architecture" in config:
        return _of_timm(config, origin)
    kind = config.get("model_type")
    if kind is None:
        return {}
    if kind in WHOLE:  # of the whole, its classes' names tell how it pools
        kind, config = (
            WHOLE[kind],
            {**(config.get("vision_config") or {}), "architectures": config.get("architectures")},
        )
    if kind not in DEFAULTS:
        raise WeightsError(
            f"{origin}: its config.json describes a {kind!r} model, which is not read: "
            f"{suggest(str(kind), DEFAULTS)}; pass name= to read the arrays as one of list_models()"
        )
    settled = {**DEFAULTS[kind], **{key: value for key, value in config.items() if value is not None}}
    fields = {
        "heads": int(settled["num_attention_heads"]),
        "norm_eps": float(settled["layer_norm_eps"]),
        "img_size": _size(settled["image_size"]),
        "activation": _activation(settled["hidden_act"], origin),
    }
    if "rope_theta" in settled:
        fields["rope_base"] = float(settled["rope_theta"])
        if settled.get("use_gated_mlp") and fields["activation"] != "silu":
            raise WeightsError(
                f"{origin}: a gated MLP with {settled['hidden_act']!r} is not read, only with 'silu'"
            )
    if str((config.get("architectures") or [""])[0]) == "CLIPForImageClassification":
        fields["pool"] = "mean"
    if kind == "deit":
        fields["family"] = "deit"
    if kind == "dinov2_with_registers":
        fields["resize"] = "timm"
    if "pooler_act" in settled:
        fields["representation_act"] = _activation(settled["pooler_act"], origin)
    return fields


def _of_timm(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    cfg = {**config, **(config.get("pretrained_cfg") or {})}
    fields: dict[str, Any] = {"resize": "timm"}
    name = str(config["architecture"]).partition(".")[0]
    if architectures.parse(name) is not None:
        fields["arch"] = name
    if other := next((what for part, what in TIMM_UNREAD.items() if part in name.split("_")), None):
        raise WeightsError(f"{origin}: timm's {name} has {other}, which no model here has")
    if len(cfg.get("input_size") or ()) == 3:
        fields["img_size"] = _size(cfg["input_size"][1:])
    for key, value in (config.get("model_args") or {}).items():
        argument = official_isotropic.TIMM_VIT.get(key) or official_isotropic.EVA.get(key)
        field = "activation" if key == "act_layer" else argument and argument.field
        if argument is not None and field is not None:
            try:
                fields[field] = argument.convert(value)
            except (TypeError, ValueError) as error:
                raise WeightsError(
                    f"{origin}: its config.json has {key}={value!r}, which is not read: {error}"
                ) from error
    pool = config.get("global_pool")
    if pool in ("token", "avg", "max", "avgmax", "map"):
        fields["pool"] = {"avg": "mean"}.get(pool, pool)
    return fields


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """One per class, as transformers' or timm's file has them; () where it has none or only "LABEL_0", ..."""
    named = config.get("id2label") or {}
    if not isinstance(named, Mapping) or {str(key) for key in named} != {str(n) for n in range(len(named))}:
        return ()
    names = tuple(str(named[key]) for key in sorted(named, key=int)) or tuple(config.get("label_names") or ())
    return () if names == tuple(f"LABEL_{number}" for number in range(len(names))) else names


def _size(value: Any) -> Any:
    sides = (value, value) if isinstance(value, int) else tuple(int(side) for side in value)
    return sides[0] if sides[0] == sides[1] else sides


def _activation(value: Any, origin: str) -> str:
    if value not in ACTIVATIONS:
        raise WeightsError(
            f"{origin}: its config.json has the activation {value!r}: {suggest(str(value), ACTIVATIONS)}"
        )
    return ACTIVATIONS[value]
