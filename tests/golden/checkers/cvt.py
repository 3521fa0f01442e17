"""CvT: kind `cvt`."""

from __future__ import annotations

import numpy as np

from dyntoken.backbones.cvt import ConvAttention, ConvEmbed
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Embeddings, attention layers, stages, class token and logits."""
    images = common.nhwc(ledger.expected("x"))
    built = common.build(case, {**case.info["constructor"], "img_size": images.shape[1:3]})
    out, seen = common.captured(built, images, (ConvEmbed, ConvAttention))
    body = built.model.plain()
    ends = np.cumsum(body.depths) - 1
    for number, end in enumerate(ends):
        name, stage = f"stage{number}", seen[f"stage_{number}"]
        ledger.offer(f"{name}/patch_embed", stage["patch_embed"]["__call__"][0].transpose(0, 3, 1, 2))
        for index in range(body.depths[number]):
            attended, _ = stage["trunk"][f"blocks_{index}"]["attn"]["__call__"][0]
            ledger.offer(f"{name}/block{index}_attn", attended)
        first, rows = np.split(out.records["blocks"][end], [body.prefixes[number]], axis=1)
        cells = rows.reshape(len(rows), *body.grids[number], -1)
        ledger.offer(f"{name}/out", cells.transpose(0, 3, 1, 2))
        ledger.offer(f"{name}/cls", first)
    # The official code squeezes the class token: one image alone loses its batch axis.
    alone = len(images) == 1 and body.prefix
    ledger.offer("logits", out.logits[0] if alone else out.logits)
