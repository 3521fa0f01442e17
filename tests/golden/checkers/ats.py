"""Adaptive token sampling: kind `ats_deit`."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np

from dyntoken import losses
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Every recorded run in mask form, the padded one in gather form, too, and one training step."""
    built = common.build(case, case.info["constructor"])
    images = common.nhwc(ledger.expected("input.images"))
    for run in sorted({name.split(".")[0] for name in case.named("output") if ".eval." in name}):
        model = built.model.clone(form="mask", method_options=(("compact", run != "padded"),))
        alone = re.fullmatch(r"single(\d+)", run)
        batch = images[int(alone[1]) :][:1] if alone else images
        _check_run(ledger, f"{run}.eval.", model, common.evaluate(model, built.variables, batch))
        if run == "padded":
            rows = common.evaluate(model.clone(form="gather"), built.variables, batch)
            name = f"{run}.eval.logits"
            ledger.close(f"{name} (gather form)", rows.logits, expected=ledger.expected(name))
    _check_training(ledger, built, {"image": images, "target": ledger.expected("input.targets")})


def _check_run(ledger: Ledger, name: str, model: Any, out: Any) -> None:
    """Our row i is patch i; theirs are the ids of the stage before, -1 for padding."""
    ledger.close(name + "logits", out.logits)
    theirs = common.first_labels(len(out.logits), out.tokens.initial)
    for stage, reduction in enumerate(out.reductions):
        stem = f"{name}stage{stage}."
        scores = np.take_along_axis(np.maximum(reduction.scores, 0.0), np.maximum(theirs, 0), axis=1)
        drawn = reduction.decision > 0.5
        ledger.equal(stem + "count", drawn.sum(axis=1))
        width = ledger.expected(stem + "ids_orig").shape[1]
        ids = np.full((len(drawn), width), -1)
        for row, kept in zip(ids, drawn, strict=True):
            patches = np.flatnonzero(kept)[:width]
            row[: len(patches)] = patches
        ledger.same_sets(stem + "ids_orig", ids)
        if ledger.holds(stem + "score"):
            ledger.close(stem + "score", np.where(theirs >= 0, scores, 0.0))
        if ledger.holds(stem + "ids_local"):
            local = common.positions(ids, theirs)
            ledger.same_sets(stem + "ids_local", np.where(ids >= 0, local, -1))
        counts = ledger.expected(stem + "count")
        theirs = ledger.expected(stem + "ids_orig")[:, : _width(name, theirs, counts)]
        at = model.at[stage]
        if ledger.holds(f"{name}block{at}.out"):
            rows = out.records["blocks"][at]
            ours = np.take_along_axis(rows[:, 1:], np.maximum(theirs, 0)[:, :, None], axis=1)
            ours = np.where((theirs >= 0)[:, :, None], ours, 0.0)
            ledger.close(f"{name}block{at}.out", np.concatenate([rows[:, :1], ours], axis=1))


def _width(name: str, rows: np.ndarray, counts: np.ndarray) -> int:
    """Rows that the reference goes on with: all, or without padding the largest count of the batch."""
    return rows.shape[1] if name.startswith("padded") else int(counts.max())


def _check_training(ledger: Ledger, built: common.Built, batch: dict[str, Any]) -> None:
    objective = losses.Objective({"ce": {}})

    def loss(params, batch):
        out = built.model.apply({**built.variables, "params": params}, batch["image"], train=True)
        return objective.total(objective.evaluate(out, batch)), out.logits

    step = jax.value_and_grad(loss, has_aux=True)
    (value, logits), grads = common.run(step, built.variables["params"], batch)
    ledger.close("train.logits", logits)
    ledger.loss("train.loss.ce", value)
    ledger.gradients("grads.safetensors", built.gradients(grads))
