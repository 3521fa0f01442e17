"""Kind `evovit_deit`: recorded runs with stages, with layers, and without the last putting back."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from dyntoken import losses
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Every recorded run; gradients are those of the first."""
    for number, (run, given) in enumerate(case.info["runs"].items()):
        constructor = {**case.info["constructor"], **given.get("constructor_override", {})}
        constructor["stage_wise_prune"] = given.get("stage_wise_prune", True)
        built = common.build(case, constructor)
        images = common.nhwc(ledger.expected("input.images"))
        if ledger.names(f"{run}.eval."):
            out = common.evaluate(built.model, built.variables, images)
            _check_output(ledger, f"{run}.eval.", built.model, out)
        if ledger.names(f"{run}.train."):
            _check_training(case, ledger, built, run, images, gradients=number == 0)


def _check_output(ledger: Ledger, stem: str, model: Any, out: Any) -> None:
    ledger.close(stem + "logits", out.logits)
    heads, prefix = model.plain().heads, out.tokens.prefix
    ours = theirs = common.first_labels(len(out.logits), out.tokens.initial)
    orders = {0: (ours, theirs)}  # block -> labels of its rows, ours and theirs
    for site, reduction in enumerate(out.reductions):
        name = f"{stem}stage{site}."
        # Ours at the end of the list: the rows that wait, in the order of their scores.
        keep = np.asarray(reduction.keep)
        order = np.argsort(-np.asarray(reduction.scores), axis=1, kind="stable")
        k = keep.shape[1]
        ours_now = common.take(ours, order)
        if ledger.holds(name + "order_local"):
            local = ledger.expected(name + "order_local")
            ledger.close(name + "score", common.align(reduction.scores, ours, theirs) * heads)
            theirs_now = common.take(theirs, local)
            for what, index in (("kept", slice(k)), ("waiting", slice(k, None))):
                ledger.same_sets(f"{name}{what} (ours)", ours_now[:, index], theirs_now[:, index])
            ledger.equal(name + "order_orig", _settled(ours_now, theirs_now, reduction, order), theirs_now)
            mine = common.positions(_settled(ours_now, theirs_now, reduction, order), theirs)
            ledger.equal(name + "order_local", mine)
        else:
            theirs_now = ours_now
        ours, theirs = ours_now, theirs_now
        orders[model.at[site]] = (ours[:, :k], theirs[:, :k])
    for block, rows in enumerate(out.records["blocks"]):
        start = max(at for at in orders if at <= block)
        ledger.offer(f"{stem}block{block}.out", common.align(rows, *orders[start], prefix))


def _settled(ours: np.ndarray, theirs: np.ndarray, reduction: Any, order: np.ndarray) -> np.ndarray:
    """Our order, in which neighbours within float noise of each other may stand as the reference has them."""
    ranked = np.take_along_axis(np.asarray(reduction.scores), order, axis=1)
    where = common.positions(theirs, ours)
    swapped = np.take_along_axis(ranked, where, axis=1)
    near = np.abs(swapped - ranked) <= 1e-6
    return np.where(near, theirs, ours)


def _check_training(
    case: Case, ledger: Ledger, built: common.Built, run: str, images: np.ndarray, *, gradients: bool
) -> None:
    batch = {"image": images, "target": ledger.expected("input.targets")}
    objective = losses.Objective({"ce": {}})

    def loss(params, batch):
        out = built.model.apply({**built.variables, "params": params}, batch["image"], train=True)
        each = [
            objective.total(objective.evaluate(out.replace(logits=logits, heads=None), batch))
            for logits in out.heads
        ]
        return objective.total(objective.evaluate(out, batch)), (out, each)

    step = jax.value_and_grad(loss, has_aux=True)
    (value, (out, each)), grads = common.run(step, built.variables["params"], batch)
    stem = f"{run}.train."
    ledger.close(stem + "logits", out.logits)
    ledger.close(stem + "logits_cls", out.heads[1])
    for name, part in zip(("avg", "cls"), each, strict=True):
        ledger.loss(f"{stem}loss.{name}", part)
    ledger.loss(stem + "loss.total", value)
    if gradients and case.has("grads.safetensors"):
        ledger.gradients("grads.safetensors", built.gradients(grads))
