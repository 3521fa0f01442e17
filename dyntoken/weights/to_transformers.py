"""Weights as transformers' files have them: its key names, and the `config.json` that its `from_pretrained` opens."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dyntoken.models import Model
from dyntoken.nn.reduction_sites import added
from dyntoken.weights import configs, foreign, pretrained, shapes, trees
from dyntoken.weights.errors import WeightsError

Tensors = dict[str, np.ndarray]
# What decides what a model computes besides its arrays; the second of the model itself.
OF_BODY = (
    *("heads", "norm_eps", "activation", "img_size", "patch_size", "tokens", "stem", "head_dim", "qk_scale"),
    *("skip_lam", "rope", "rope_layout", "rope_base", "embed_class", "distilled", "class_token", "registers"),
)
OF_MODEL = ("fc_norm", "token_head", "pool_prefix", "representation_size")
WORDS = {ours: theirs for theirs, ours in reversed(configs.ACTIVATIONS.items())}
EVA = (  # of timm's `Eva`, beside the rows of the layout
    ("layer_scale1.lambda1", "gamma_1"),
    ("layer_scale2.lambda1", "gamma_2"),
    ("attention.q_proj.bias", "attn.q_bias"),
    ("attention.v_proj.bias", "attn.v_bias"),
    ("mlp.up_proj", "mlp.fc1_x"),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of model of transformers.

    Attributes:
      kind: its `model_type`.
      layout: the words of the `foreign.Layout` of its files.
      bare, classifier: its classes; None: it has none.
      pool: what the classifier reads, as `create_model` calls it.
      settings: of `config.json` besides those of all kinds, by our body and timm's arrays.
      block: what stands before a block's names, `{}` its number.
      root: what stands before all names of the model beside a classifier.
      spelling: which spelling of the layout's rows.
      finish: what names alone do not say, on arrays in timm's names.
    """

    kind: str
    layout: str
    bare: str
    classifier: str | None
    pool: str
    settings: Callable[[Any, Tensors], dict[str, Any]]
    block: str
    root: str
    spelling: int = 0
    finish: Callable[[Tensors], None] = lambda tensors: None


def _mlp(body: Any, tensors: Tensors) -> dict[str, Any]:
    return {"intermediate_size": len(tensors["blocks.0.mlp.fc1.weight"]), "qkv_bias": bool(body.qkv_bias)}


def _dinov2(body: Any, tensors: Tensors) -> dict[str, Any]:
    """Its hidden channels are a multiple of the width, with a gate 2/3 of it in whole eights."""
    read, gated = tensors["blocks.0.mlp.fc2.weight"].shape[1], body.activation == "swiglu"
    share = shapes.ratio(int(1.5 * read) if gated else read, body.width)
    usual = (int(4 * body.width * 2 / 3) + 7) // 8 * 8 == read if gated else share == 4
    found = {"mlp_ratio": 4 if usual else share, "use_swiglu_ffn": gated, "qkv_bias": bool(body.qkv_bias)}
    return found | ({"num_register_tokens": body.registers} if body.registers else {})


def _dinov3(body: Any, tensors: Tensors) -> dict[str, Any]:
    gate = tensors.get("blocks.0.mlp.fc1_g.weight")
    return {
        "intermediate_size": len(tensors["blocks.0.mlp.fc1.weight"] if gate is None else gate),
        "use_gated_mlp": gate is not None,
        "rope_theta": body.rope_base,
        "num_register_tokens": body.registers,
        **{f"{name}_bias": bool(body.qkv_bias) for name in ("query", "value")},
        "key_bias": body.qkv_bias is True,
        "proj_bias": body.proj_bias,
        "mlp_bias": body.proj_bias,
    }


def _mask_row(tensors: Tensors) -> None:
    """Read in pretraining alone; the class would draw one."""
    tensors["mask_token"] = np.zeros((1, tensors["cls_token"].shape[-1]), np.float32)


def _mask_rows(tensors: Tensors) -> None:
    """DINOv3's, and no registers as an array of no rows, which the class wants, too."""
    tensors["mask_token"] = np.zeros_like(tensors["cls_token"])
    tensors.setdefault("reg_token", tensors["cls_token"][:, :0])


def _class_row(tensors: Tensors) -> None:
    """The class token's position, which ours have in the token itself, see `foreign.fold_class_row`."""
    _mask_row(tensors)
    tensors["pos_embed"] = np.concatenate([np.zeros_like(tensors["cls_token"]), tensors["pos_embed"]], axis=1)


def _token_of_one_head(tensors: Tensors) -> None:
    """What `foreign` reads as a register, since no head reads it."""
    tensors["dist_token"] = tensors.pop("reg_token")


def _target(
    kind: str, layout: str, classes: tuple[str, str | None], pool: str, settings: Any, **more: Any
) -> Target:
    fields = {"block": "encoder.layer.{}.", "root": f"{kind}.", **more}
    return Target(kind, f"Hugging Face's {layout} layout", *classes, pool, settings, **fields)


DEIT = ("DeiTModel", "DeiTForImageClassificationWithTeacher")
ONE_HEAD = ("DeiTModel", "DeiTForImageClassification")
DINOV2 = ("Dinov2Model", "Dinov2ForImageClassification")
REGISTERS = ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification")
DINOV3 = ("DINOv3ViTModel", None)
# By what our bodies have: LayerScale, rotary positions, a distillation token, registers.
TARGETS = {
    "plain": _target("vit", "ViT", ("ViTModel", "ViTForImageClassification"), "token", _mlp),
    "distilled": _target("deit", "ViT", DEIT, "token", _mlp),
    "registers": _target("deit", "ViT", ONE_HEAD, "token", _mlp, finish=_token_of_one_head),
    "scaled": _target("dinov2", "DINOv2", DINOV2, "token_mean", _dinov2, finish=_mask_row),
    "scaled_registers": _target(
        "dinov2_with_registers", "DINOv2", REGISTERS, "token_mean", _dinov2, finish=_class_row
    ),
    "rotary": _target(
        "dinov3_vit",
        "DINOv3",
        DINOV3,
        "token",
        _dinov3,
        block="layer.{}.",
        root="",
        spelling=1,
        finish=_mask_rows,
    ),
}


def to_transformers(
    model: Model, variables: Mapping[str, Any], class_names: Sequence[str] = ()
) -> tuple[Tensors, dict[str, Any]]:
    """Variables as transformers' arrays, and what its `config.json` says; without what a reduction method adds.

    Before they are returned they are read as `load_pretrained` does: the same model and the same bits.

    Args:
      model: a ViT, DeiT, DINOv2 or DINOv3 from `create_model` or `load_pretrained`.
      variables: of the model.
      class_names: one per class, or none.

    Raises:
      WeightsError: transformers has no class that computes what the model does.
    """
    body = model.plain() if isinstance(model, Model) else None
    if body is None or not hasattr(body, "rope"):
        raise WeightsError(
            f"{model.arch}: written for transformers are ViT, DeiT, DINOv2 and DINOv3, nothing else"
        )
    target = TARGETS[_row(body)]
    if model.num_classes and (target.classifier is None or target.pool != model.pool):
        reads = f"one that reads pool={target.pool!r}" if target.classifier else "none"
        raise WeightsError(
            f"{model.arch}: its classifier reads pool={model.pool!r}, transformers' {target.kind} has {reads}; "
            "write it without: num_classes=0"
        )
    if not (body.proj_bias or body.rope):
        raise WeightsError(
            f"{model.arch}: transformers' {target.kind} needs a bias in every layer, proj_bias=True"
        )
    flat = {path: np.asarray(v) for path, v in trees.flat_variables(variables).items() if not added(path)}
    tensors = trees.reference_keys(model).export(flat)
    config = _config(model, body, target, tensors, class_names)
    target.finish(tensors)
    named = _named(tensors, target, body, bool(model.num_classes))
    _check(model, flat, named, config)
    return named, config


def _row(body: Any) -> str:
    if body.rope is not None:
        return "rotary"
    if body.layer_scale is not None:
        return "scaled_registers" if body.registers else "scaled"
    return "distilled" if body.distilled else "registers" if body.registers else "plain"


def _config(
    model: Model, body: Any, target: Target, tensors: Tensors, class_names: Sequence[str]
) -> dict[str, Any]:
    gated = body.activation == "swiglu"
    config = {
        "architectures": [target.classifier if model.num_classes else target.bare],
        "model_type": target.kind,
        "hidden_size": body.width,
        "num_hidden_layers": body.depth,
        "num_attention_heads": body.heads,
        "hidden_act": "silu" if gated else WORDS.get(body.activation, body.activation),
        "layer_norm_eps": body.norm_eps,
        "image_size": body.img_size,
        "patch_size": body.patch_size,
        "num_channels": body.in_chans,
        "dtype": "float32",
        **target.settings(body, tensors),
    }
    if model.representation_size:
        config |= {
            "pooler_act": WORDS[model.representation_act],
            "pooler_output_size": model.representation_size,
        }
    if model.num_classes:
        names = class_names or [f"LABEL_{number}" for number in range(model.num_classes)]
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    return config


def _named(tensors: Tensors, target: Target, body: Any, classifies: bool) -> Tensors:
    """The inverse of `foreign.renamed`."""
    layout = next(row for row in foreign.LAYOUTS if row.words == target.layout)
    blocks, others, heads = (
        {ours: _spelling(theirs, target.spelling) for theirs, ours in rows}
        for rows in (layout.blocks, layout.others, layout.heads)
    )
    if body.rope is not None:
        blocks |= {ours: theirs for theirs, ours in EVA}
        others["norm"] = "norm"
    elif body.activation == "swiglu":
        blocks |= {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
    if "head_dist" in {key.partition(".")[0] for key in tensors}:
        heads["head"] = "cls_classifier"
    found: Tensors = {}
    for key, value in tensors.items():
        block = re.match(r"blocks\.(\d+)\.", key)
        name, table = (key[block.end() :], blocks) if block else (key, others | heads)
        stem, _, leaf = (name, "", "") if name in table else name.rpartition(".")
        if stem not in table:
            raise WeightsError(f"transformers' {target.kind} has no place for {key}")
        start, _, parts = table[stem].partition("{")
        names = [start + part for part in parts.rstrip("}").split(",")]
        root = target.root if classifies and stem not in heads else ""
        before = root + (target.block.format(block[1]) if block else "")
        for one, part in zip(names, np.split(value, len(names)), strict=True):
            found[before + ".".join(filter(None, (one, leaf)))] = np.ascontiguousarray(part)
    return found


def _spelling(theirs: str, number: int) -> str:
    spellings = theirs.split("|")
    return spellings[min(number, len(spellings) - 1)]


def _check(model: Model, flat: Tensors, named: Tensors, config: Mapping[str, Any]) -> None:
    """Raises `WeightsError` unless what was written is read as this model with these bits."""
    again, read = pretrained.load_pretrained(named, config=config, rest="drop", return_report=True)[:2]
    one, other = model.plain(), again.plain()
    of_head = {"pool": model.num_classes, "representation_act": model.representation_size}
    ahead = [field for field, there in of_head.items() if there]
    pairs = [(field, getattr(one, field), getattr(other, field)) for field in OF_BODY]
    pairs += [(field, getattr(model, field), getattr(again, field)) for field in (*OF_MODEL, *ahead)]
    wrong = [f"{field}={ours!r}, there {theirs!r}" for field, ours, theirs in pairs if ours != theirs]
    back = trees.flat_variables(read)
    wrong += [path for path in flat if path not in back or not np.array_equal(flat[path], back[path])]
    wrong += [path for path in back if path not in flat]
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise WeightsError(
            f"{model.arch}: transformers' {config['model_type']} does not compute it: {'; '.join(wrong[:4])}{more}"
        )
