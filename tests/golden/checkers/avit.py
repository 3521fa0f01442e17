"""Kind `avit_deit`: halting row by row, its two losses, gradients."""

from __future__ import annotations

import jax
import numpy as np

from dyntoken import losses
from dyntoken.losses.halting import prior_of
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Evaluation and training, by the case's own weights of the losses."""
    built = common.build(case, case.info["constructor"])
    images = common.nhwc(ledger.expected("input.images"))
    if ledger.names("eval."):
        out = common.evaluate(built.model, built.variables, images)
        ledger.close("eval.logits", out.logits)
        ledger.offer("eval.halting_score", np.stack(out.state.scores))
        if ledger.holds("eval.mask"):
            ledger.equal("eval.mask", np.stack(out.state.masks))
        if ledger.holds("eval.depth"):
            ledger.equal("eval.depth", out.state.depth)
        ledger.offer("eval.rho", out.state.ponder)
        for block, rows in enumerate(out.records["blocks"]):
            ledger.offer(f"eval.block{block}.out", rows)
    if ledger.names("train."):
        _check_training(case, ledger, built, images)


def _check_training(case: Case, ledger: Ledger, built: common.Built, images: np.ndarray) -> None:
    args = case.info["constructor"]["args"]
    batch = {"image": images, "target": ledger.expected("input.targets")}
    specs = {"ce": {}, "ponder": {"weight": float(args.get("ponder_token_scale", 0.0))}}
    if ledger.holds("train.loss.distr_prior"):
        options = {"center": 8.0, "reference": True}
        specs["halting_prior"] = {"weight": float(args["distr_prior_alpha"]), **options}
    objective = losses.Objective(specs)

    def loss(params, batch):
        out = built.model.apply({**built.variables, "params": params}, batch["image"], train=True)
        pairs = objective.evaluate(out, batch)
        each = {term.key: term.weight * losses.average(*pairs[term.key]) for term in objective.terms}
        return objective.total(pairs), (out, each)

    step = jax.value_and_grad(loss, has_aux=True)
    (value, (out, each)), grads = common.run(step, built.variables["params"], batch)
    ledger.close("train.logits", out.logits)
    for key, name in (("ce", "ce"), ("ponder", "ponder")):
        ledger.loss(f"train.loss.{name}", each[key])
    ledger.offer("train.halting_layer_mean", np.stack(out.state.scores)[:, 1:].mean(axis=(1, 2)))
    if "halting_prior" in each:
        # The official step adds it only where it is above 0.
        recorded = np.maximum(ledger.expected("train.loss.distr_prior"), 0.0)
        ledger.close("train.loss.distr_prior", each["halting_prior"], 1e-5, recorded)
    if ledger.holds("train.distr_target"):
        ledger.close("train.distr_target", prior_of(len(out.state.scores), 8.0, reference=True))
    ledger.loss("train.loss.total", value)
    if case.has("grads.safetensors"):
        ledger.gradients("grads.safetensors", built.gradients(grads))
