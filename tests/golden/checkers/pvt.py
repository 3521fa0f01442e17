"""PVT: kind `pvt`."""

from __future__ import annotations

from typing import Any

import numpy as np

from dyntoken import weights
from dyntoken.backbones.pvt import Embed, SpatialReductionAttention
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Embeddings, attention layers, stages and logits; images of another size."""
    built = common.build(case, case.info["constructor"])
    images = common.nhwc(ledger.expected("x"))
    out, seen = common.captured(built, images, (Embed, SpatialReductionAttention))
    ends = np.cumsum(built.model.plain().depths) - 1
    for number, end in enumerate(ends):
        name, stage = f"stage{number + 1}", seen[f"stage_{number}"]
        embedded = stage["patch_embed"]["__call__"][0]
        ledger.offer(f"{name}/patch_embed", embedded.reshape(len(images), -1, embedded.shape[-1]))
        for index in range(built.model.plain().depths[number]):
            attended, _ = stage["trunk"][f"blocks_{index}"]["attn"]["__call__"][0]
            ledger.offer(f"{name}/block{index}_attn", attended)
        ledger.offer(f"{name}/out", out.records["blocks"][end])
    ledger.offer("logits", out.logits)
    if ledger.holds("x_other_size"):
        _check_other_size(case, ledger, built.model)


def _check_other_size(case: Case, ledger: Ledger, model: Any) -> None:
    """The official keys loaded into a model of that size, which resizes the positions of every stage."""
    images = common.nhwc(ledger.expected("x_other_size"))
    model = common.with_options(model, img_size=images.shape[1:3])
    variables = weights.load_weights(model, case.tensors("weights.safetensors"), strict=True)
    ledger.offer("logits_other_size", common.evaluate(model, variables, images).logits)
