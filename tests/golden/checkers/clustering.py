"""Clustering baselines: kinds `dpcknn_deit`, `kmedoids_deit`, `sinkhorn_deit`, `patchmerger_deit`, `sit_deit`."""

from __future__ import annotations

from typing import Any

import jax

from dyntoken import losses
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Evaluation and one training step, both in gather form, with the recorded noise if there is any."""
    built = common.build(case, case.info["constructor"])
    images = common.nhwc(ledger.expected("input.images"))
    noise = tuple(ledger.expected(name) for name in sorted(ledger.names("noise.stage"), key=_number)) or None
    out = common.run(
        lambda v, x, n: built.model.apply(v, x, noise=n, record=common.RECORD), built.variables, images, noise
    )
    ledger.close("eval.logits", out.logits)
    for stage, reduction in enumerate(out.reductions):
        name = f"eval.stage{stage}."
        ledger.equal(name + "assignment", reduction.remap)
        if ledger.holds(name + "centers"):
            ledger.equal(name + "centers", reduction.keep)
        if reduction.shares is not None:
            ledger.offer(name + "soft_assignment", reduction.shares)
        ledger.offer(name + "block_out", out.records["blocks"][built.model.at[stage]])
    _check_training(ledger, built, {"image": images, "target": ledger.expected("input.targets")}, noise)


def _number(name: str) -> int:
    return int(name.removeprefix("noise.stage"))


def _check_training(ledger: Ledger, built: common.Built, batch: dict[str, Any], noise: Any) -> None:
    objective = losses.Objective({"ce": {}})

    def loss(params, batch, noise):
        variables = {**built.variables, "params": params}
        out = built.model.apply(variables, batch["image"], train=True, noise=noise)
        return objective.total(objective.evaluate(out, batch)), out.logits

    step = jax.value_and_grad(loss, has_aux=True)
    (value, logits), grads = common.run(step, built.variables["params"], batch, noise)
    ledger.close("train.logits", logits)
    ledger.loss("train.loss.ce", value)
    # Its weights are normalised, so that a constant in their score has no effect.
    ledger.gradients("grads.safetensors", built.gradients(grads), noise=r"score\.bias$")
