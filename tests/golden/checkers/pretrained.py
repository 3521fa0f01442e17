"""Pretrained layouts at several image sizes: timm's kinds (`vit_timm`, `dinov2_timm`, ..., `eva02_timm`).

`compare` serves other libraries' layouts, too.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import dyntoken
from dyntoken import weights
from dyntoken.backbones.isotropic import Isotropic
from dyntoken.nn.trunk import Context
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger

RECORD = ("features", "embed", "blocks")


def check(case: Case, ledger: Ledger) -> None:
    """Every run: the constructor's own size by `import_reference`, others by `load_weights`."""
    built = common.build(case, case.info["constructor"])
    tensors = case.tensors("weights.safetensors")
    back = weights.export_reference(built.model, built.variables)
    ledger.same("keys of the exported weights", sorted(back), sorted(tensors))
    for key in tensors.keys() & back.keys():
        ledger.equal(f"exported {key}", back[key], tensors[key])
    for run in case.info["runs"]:
        model, variables = at_size(case, run, built.model, built.variables, tensors)
        compare(ledger, run, model, variables)


def at_size(case: Case, run: str, model: Any, variables: Any, source: Any) -> tuple[Any, Any]:
    """The model for the images of a run, with `source` loaded where these are of another size."""
    row = case.info["runs"][run]
    size = (row["height"], row["width"])
    if model.input_shape[:2] == size:
        return model, variables
    other = common.with_options(model, img_size=size)
    grid = model.plain().grid  # 6 x 6 patches are as many as 4 x 9: no file says which it has
    return other, dyntoken.load_weights(other, source, source_grid=grid)


def compare(ledger: Ledger, run: str, model: Any, variables: Any, pos_embed: Any = None) -> tuple[Any, Any]:
    """All arrays of a run.

    Args:
      model, variables: for the run's image size.
      pos_embed: the position embedding in the layout of the case; by default as our own
        tree holds it.

    Returns:
      the model's output and what its classifier reads.
    """
    images = common.nhwc(ledger.expected(f"{run}.input.images"))
    out, inner, pooled = common.run(lambda v, x: _everything(model, v, x), variables, images)
    if pos_embed is None:
        pos_embed = variables["params"]["backbone"].get("pos_embed")
    found = {
        "logits": out.logits,
        "features": out.tokens.x,
        "pooled": pooled
        if out.heads is None
        else out.tokens.x[:, 0],  # of two heads: what the first one reads
        "embed": out.records["embed"],
        "embed_before_norm_pre": inner["stem"],
        "pos_embed": pos_embed,
        **{f"block{index}.out": rows for index, rows in enumerate(out.records["blocks"])},
    }
    prefix = (body := model.plain()).prefix
    if (rope := body.rotary()) is not None:
        angles = rope.angles(body.grid)
        found["rope"] = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    for index, logits in enumerate(inner["relations"]):
        probs = np.asarray(jax.nn.softmax(logits, axis=-1)).mean(axis=1)
        found[f"block{index}.cls_attn"] = probs[:, 0, prefix:]
        found[f"block{index}.attn_received"] = probs.mean(axis=1)[:, prefix:]
    for name, value in found.items():
        ledger.offer(f"{run}.eval.{name}", value)
    return out, pooled


def _everything(model: Any, variables: Any, images: Any) -> tuple[Any, dict[str, Any], Any]:
    """The model's output, what only its backbone shows, and what its classifier reads."""

    def inside(m: Any, x: Any) -> dict[str, Any]:
        context = Context(record=("relations",))
        _, _, records = m.body(x, context)
        return {**records, "stem": Isotropic.embed(m.body, x, context).x}

    out = model.apply(variables, images, record=RECORD)
    inner = model.apply(variables, images, method=inside)
    return out, inner, model.clone(num_classes=0).apply(variables, images).logits
