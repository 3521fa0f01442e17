"""PiToMe and the ToFu in its repository: kinds `pitome_deit` and `tofu_deit`."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken import losses
from dyntoken.ops import select
from tests.golden.case import Case
from tests.golden.checkers import common, merging
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Every recorded run, and the training step."""
    for name, run in case.info["runs"].items():
        _check_run(case, ledger, name, run)
    if ledger.names("train."):
        what = case.info["arrays"]["train.logits"]["what"]
        found = re.search(r"ratio ([0-9.]+)", what)
        rate = float(found.group(1)) if found else next(iter(case.info["runs"].values()))["ratio"]
        _check_training(case, ledger, rate)


def _build(case: Case, rate: float) -> common.Built:
    return merging.build(case, case.kind.removesuffix("_deit"), rate=rate, reference=True)


def _check_run(case: Case, ledger: Ledger, name: str, run: dict[str, Any]) -> None:
    built = _build(case, run["ratio"])
    out, seen = merging.evaluate(built, common.nhwc(ledger.expected("input.images")))
    prefix, first = out.tokens.prefix, out.tokens.initial
    ledger.close(f"{name}.logits", out.logits)
    entering = [prefix + count for count in (first, *(reduction.count for reduction in out.reductions[:-1]))]
    ledger.offer(f"{name}.flops", np.float64(_flops(built.model.plain(), entering)))
    for block, reduction in enumerate(out.reductions):
        stem = f"{name}.block{block}."
        ledger.offer(stem + "out", out.records["blocks"][block])
        if ledger.holds(stem + "metric"):
            ledger.close(stem + "metric", seen[block].keys.mean(axis=1))
        if ledger.holds(stem + "dst"):
            ledger.equal(stem + "dst", merging.destinations(reduction, prefix))
        sizes = np.asarray(select.sizes(jnp.asarray(reduction.carrier), reduction.count))
        ledger.offer(stem + "size", merging.with_prefix(sizes, prefix, 1.0))
    ledger.equal(f"{name}.source", merging.source(out.tokens.carrier, out.tokens.count, prefix))
    ledger.offer(f"{name}.size", merging.with_prefix(out.tokens.size, prefix, 1.0))


def _flops(body: Any, entering: list[int]) -> float:
    """The official count: multiply-adds of the blocks, as if no row left within one and MLPs had ratio 4."""
    width = body.width
    return sum(12 * n * width**2 + 2 * n**2 * width for n in entering)


def _check_training(case: Case, ledger: Ledger, rate: float) -> None:
    built = _build(case, rate)
    batch = {
        "image": common.nhwc(ledger.expected("input.images")),
        "target": ledger.expected("input.targets"),
    }

    def loss(params: Any, batch: Any) -> Any:
        out = built.model.apply({"params": params}, batch["image"], train=True)
        return (objective := losses.Objective({"ce": {}})).total(objective.evaluate(out, batch)), out.logits

    (value, logits), grads = common.run(
        jax.value_and_grad(loss, has_aux=True), built.variables["params"], batch
    )
    ledger.close("train.logits", logits)
    ledger.loss("train.loss.ce", value)
    ledger.gradients("grads.safetensors", built.gradients(grads))
