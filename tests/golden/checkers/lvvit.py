"""LV-ViT: kind `lvvit`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from dyntoken.ops import mixing
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Stem, every block, norm, both heads, and MixToken with the recorded box."""
    built = common.build(case, case.info["constructor"])
    images = common.nhwc(ledger.expected("x"))
    out = common.evaluate(built.model, built.variables, images)
    positions = np.asarray(built.variables["params"]["backbone"]["pos_embed"])
    rows, grid = (out.records["embed"] - positions)[:, 1:], built.model.plain().grid
    ledger.offer("patch_embed", rows.reshape(len(rows), *grid, -1).transpose(0, 3, 1, 2))
    for index, block in enumerate(out.records["blocks"]):
        ledger.offer(f"block{index}", block)
    ledger.offer("norm", out.tokens.x)
    ledger.offer("logits", out.logits)
    ledger.offer("logits_aux", out.dense)
    silent = common.with_options(built.model, aux_weight=0.0)  # then the class token alone decides
    ledger.offer("logits_cls", common.evaluate(silent, built.variables, images).logits)
    if "mix_box" in case.info:
        _check_mixing(case, ledger, built, images)


def _check_mixing(case: Case, ledger: Ledger, built: common.Built, images: np.ndarray) -> None:
    """Training with the running statistics, as recorded; every row is mixed with that of the flipped batch."""
    model = common.with_options(built.model, frozen_stats=True)
    grid = model.plain().grid
    # Our partners are rows 2i and 2i + 1: put each row beside its partner in the flipped batch.
    order = np.stack([np.arange(len(images)), np.arange(len(images))[::-1]], axis=1).reshape(-1)

    def forward(variables: Any, images: Any, key: Any) -> Any:
        out = model.apply(variables, images, train=True, rngs={"dropout": key}, record=("dense",))
        return out.logits, out.mixed, mixing.swap(out.dense, out.mixed[0])

    wanted = _cells(case.info["mix_box"], grid)
    drawn = jax.vmap(lambda seed: forward(built.variables, images[order], jax.random.key(seed))[1][0])
    boxes = common.run(drawn, np.arange(2000))  # nothing but the boxes is computed
    hits = np.flatnonzero((boxes == wanted.reshape(-1)).all(axis=1))
    if not len(hits):
        raise ValueError(f"no seed draws the recorded box {case.info['mix_box']}")
    key = jax.random.key(hits[0])
    logits, mixed, dense = common.run(forward, built.variables, images[order], key)
    ledger.equal("mix_box (case.json)", mixed[0].reshape(grid), wanted)
    ledger.offer("mixtoken/logits_cls", logits[::2])
    ledger.offer("mixtoken/logits_aux", dense[::2])


def _cells(box: Any, grid: tuple[int, int]) -> np.ndarray:
    top, left, bottom, right = box
    cells = np.zeros(grid, bool)
    cells[top:bottom, left:right] = True
    return cells
