"""Swin: kind `swin`."""

from __future__ import annotations

from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Patch embedding, every block, what each stage hands on, norm, logits."""
    built = common.build(case, case.info["constructor"])
    out = common.evaluate(built.model, built.variables, common.nhwc(ledger.expected("x")))
    ledger.offer("patch_embed", out.records["embed"])
    blocks = list(out.records["blocks"])
    depths = built.model.plain().depths
    for stage, depth in enumerate(depths):
        own = [blocks.pop(0) for _ in range(depth)]
        for index, block in enumerate(own):
            ledger.offer(f"layer{stage}/block{index}", block)
        if stage + 1 < len(depths):
            ledger.offer(f"layer{stage}/out", common.shrunk(built, stage + 1, own[-1]))
        else:
            ledger.offer(f"layer{stage}/out", own[-1])
    ledger.offer("norm", out.tokens.patches)
    ledger.offer("logits", out.logits)
