"""timm's dense ViTs at their own size and at others: kinds `vit_timm`, `dinov2_timm`, `dinov2_reg_timm`."""

from __future__ import annotations

import re

from dyntoken import weights
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Every run: rows entering block 0, blocks, final tokens, logits; positions resized as timm does."""
    built = common.build(case, case.info["constructor"])
    for run in ("native", "large", "wide"):
        if not ledger.holds(f"{run}.input.images"):
            continue
        images = common.nhwc(ledger.expected(f"{run}.input.images"))
        model = weights.with_image_size(built.model, images.shape[1:3])
        variables = weights.load_weights(model, built.variables, resize="timm", return_report=True)[0]
        out = common.evaluate(model, variables, images)
        ledger.offer(f"{run}.eval.embed", out.records["embed"])
        ledger.offer(f"{run}.eval.features", out.tokens.x)
        ledger.offer(f"{run}.eval.logits", out.logits)
        for index, block in enumerate(out.records["blocks"]):
            ledger.offer(f"{run}.eval.block{index}.out", block)
    for name in case.arrays:
        if re.search(r"(cls_attn|attn_received|pooled|pos_embed)$", name) or name.startswith("padded."):
            ledger.skip(name, "not recorded by a dense model")
