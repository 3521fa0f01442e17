"""Dense models: kinds `deit` and `deit_distilled`."""

from __future__ import annotations

import jax

from dyntoken import losses
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Evaluation, the heads one by one, the training loss and its gradients."""
    built = common.build(case, case.info["constructor"])
    images = common.nhwc(ledger.expected("input.images"))
    out = common.evaluate(built.model, built.variables, images)
    found = {
        "eval.logits": out.logits,
        "eval.embed": out.records["embed"],
        "eval.features": out.tokens.x,
        **{f"eval.block{index}.out": block for index, block in enumerate(out.records["blocks"])},
    }
    if out.heads is not None:
        found |= {"eval.logits_cls": out.heads[0], "eval.logits_dist": out.heads[1]}
    for name, value in found.items():
        ledger.offer(name, value)

    batch = {"image": images, "target": ledger.expected("input.soft_targets")}
    specs = {"ce": {}}

    def loss(params, batch):
        output = built.model.apply({**built.variables, "params": params}, batch["image"], train=True)
        return (objective := losses.Objective(specs)).total(objective.evaluate(output, batch))

    value, grads = common.run(jax.value_and_grad(loss), built.variables["params"], batch)
    ledger.loss("train.loss.ce", value)
    ledger.gradients("grads.safetensors", built.gradients(grads))
