"""Kind `ltmp_deit`: learnt thresholds in mask form, and as rows are dropped image by image."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from dyntoken import losses
from dyntoken.losses.flops_share import share_of
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Every recorded run."""
    constructor = dict(case.info["constructor"])
    built = common.build(case, constructor)
    images = common.nhwc(ledger.expected("input.images"))
    if ledger.names("mask.eval."):
        _check_mask(ledger, common.evaluate(built.model, built.variables, images))
    dropped = sorted({name.split(".")[0] for name in ledger.names("drop")})
    if dropped:
        model = built.model.clone(method_options=(*built.model.method_options, ("rows", "dropped")))
        out = common.evaluate(model, built.variables, images)
        for run in dropped:
            _check_drop(ledger, run, out, int(run.removeprefix("drop")))
    if ledger.names("train."):
        _check_training(case, ledger, built, images)


def _check_mask(ledger: Ledger, out: Any) -> None:
    stem = "mask.eval."
    ledger.close(stem + "logits", out.logits)
    for number, block in enumerate(out.state.blocks):
        if ledger.holds(f"{stem}block{number}.mask"):
            ledger.equal(f"{stem}block{number}.mask", block.mask)
        for what in ("similarity", "importance"):
            _finite(ledger, f"{stem}block{number}.{what}", getattr(block, what))
    if ledger.holds(stem + "source"):
        carrier, prefix = np.asarray(out.tokens.carrier), out.tokens.prefix
        ours = np.zeros(ledger.expected(stem + "source").shape)
        ours[:, range(prefix), range(prefix)] = 1
        for sample, cell in np.ndindex(carrier.shape):
            if carrier[sample, cell] >= 0:
                ours[sample, prefix + carrier[sample, cell], prefix + cell] = 1
        alive = np.asarray(out.state.blocks[-1].mask)[..., None]
        ledger.equal(stem + "source", ours * alive, ledger.expected(stem + "source") * alive)


def _finite(ledger: Ledger, name: str, ours: Any) -> None:
    """Compares where the reference is finite; infinities must be the same ones."""
    if not ledger.holds(name):
        return
    theirs, ours = ledger.expected(name), np.asarray(ours)
    if ours.shape == theirs.shape:
        same = np.where(np.isfinite(theirs), 0.0, theirs)
        ledger.equal(f"{name} infinities", np.where(np.isfinite(ours), 0.0, ours), same)
        ours, theirs = (np.where(np.isfinite(theirs), values, 0.0) for values in (ours, theirs))
    ledger.close(name, ours, expected=theirs)


def _check_drop(ledger: Ledger, run: str, out: Any, sample: int) -> None:
    stem = f"{run}.eval."
    ledger.close(stem + "logits", out.logits[sample : sample + 1])
    blocks = out.state.blocks
    left = [np.asarray(block.left)[sample] > 0.5 for block in blocks]
    if ledger.holds(stem + "rows"):
        last = np.asarray(blocks[-1].mask)[sample] > 0.5
        ledger.equal(stem + "rows", [rows.sum() for rows in (*left, last)])
    for number, block in enumerate(blocks):
        _finite(ledger, f"{stem}block{number}.importance", block.importance[sample][left[number]][None])


def _check_training(case: Case, ledger: Ledger, built: common.Built, images: np.ndarray) -> None:
    given = case.info["constructor"]
    batch = {"image": images, "target": ledger.expected("input.targets")}
    regular = {"target": float(given["reduction_target"]), "weight": float(given["reg_scale"])}
    objective = losses.Objective({"ce": {}, "flops_share": regular})

    def loss(params, batch):
        out = built.model.apply({**built.variables, "params": params}, batch["image"], train=True)
        pairs = objective.evaluate(out, batch)
        return objective.total(pairs), (out, {key: losses.average(*pair) for key, pair in pairs.items()})

    step = jax.value_and_grad(loss, has_aux=True)
    (value, (out, each)), grads = common.run(step, built.variables["params"], batch)
    ledger.close("train.logits", out.logits)
    means = [np.asarray(block.mask).mean() for block in out.state.blocks]
    ledger.offer("train.mask_means", np.stack(means))
    rows, width = out.state.blocks[0].mask.shape[1], out.state.width
    ledger.offer("train.flops_ratio", share_of(means, rows, width))
    ledger.loss("train.loss.ce", each["ce"])
    ledger.loss("train.loss.reg", each["flops_share"])
    ledger.loss("train.loss.total", value)
    if case.has("grads.safetensors"):
        ledger.gradients("grads.safetensors", built.gradients(grads))
