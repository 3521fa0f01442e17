"""MCTF: kind `mctf_deit`, every run and the training of student and teacher pass."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from dyntoken import losses
from tests.golden.case import Case
from tests.golden.checkers import common, merging
from tests.golden.ledger import Ledger

AHEAD = {0: "end", 1: "map", 2: "rows"}
POOLING = {0: "size", 1: "attention", 2: "max", 3: "none"}


def check(case: Case, ledger: Ledger) -> None:
    """Every recorded run, and the training step."""
    for name, run in case.info["runs"].items():
        _check_run(case, ledger, name, run)
    if ledger.names("train."):
        _check_training(case, ledger)


def _build(case: Case, run: dict[str, Any], r: Any = None) -> common.Built:
    given = dict(zip(case.info["constructor"]["mctf_type_names"], run["mctf_type"], strict=False))
    r = given["r_student"] if r is None else r
    options = {name: float(given[name]) for name in ("tau_sim", "tau_info", "tau_size")}
    return merging.build(
        case,
        "mctf",
        r=r if run.get("use_mctf", True) else 0,
        at=tuple(run["activate_layer"]),
        proportional=bool(given["prop_attn"]),
        ahead=AHEAD[given["one_step_ahead"]],
        bidirectional=bool(given["bidirection"]),
        pooling=POOLING[given["pooling_type"]],
        **options,
    )


def _check_run(case: Case, ledger: Ledger, name: str, run: dict[str, Any]) -> None:
    built, stem = _build(case, run), f"{name}.eval."
    out, seen = merging.evaluate(built, common.nhwc(ledger.expected("input.images")))
    prefix = out.tokens.prefix
    ledger.close(stem + "logits", out.logits)
    before = [prefix + reduction.remap.shape[1] for reduction in out.reductions]
    after = [prefix + reduction.count for reduction in out.reductions]
    r = [b - a for b, a in zip(before, after, strict=True)]
    if ledger.holds(stem + "r"):
        both = zip(before, r, strict=True)
        fuses = (
            [pair for pair in both if pair[1]]
            if len(ledger.expected(stem + "r")) < len(r)
            else [*zip(before, r, strict=True)]
        )
        ledger.equal(stem + "tokens_before", [pair[0] for pair in fuses])
        ledger.equal(stem + "r", [pair[1] for pair in fuses])
    for block, rows in enumerate(out.records["blocks"]):
        ledger.offer(f"{stem}block{block}.out", rows)
    for stage, (at, reduction) in enumerate(zip(built.model.at, out.reductions, strict=True)):
        if ledger.holds(f"{stem}stage{stage}.dst"):
            ledger.equal(f"{stem}stage{stage}.dst", merging.destinations(reduction, prefix))
        ledger.offer(f"{stem}stage{stage}.info", seen[at].probs.mean(axis=(1, 2)))
    ledger.offer(stem + "size", merging.with_prefix(out.tokens.size, prefix, 1.0))


def _check_training(case: Case, ledger: Ledger) -> None:
    train = case.info["train"]
    run = case.info["runs"][train["run"]]
    student = _build(case, run)
    teacher = _build(case, run, r=int(ledger.expected("train.r_teacher")))
    labels, targets = ledger.expected("train.labels"), ledger.expected("input.targets")
    one_hot = np.eye(targets.shape[1], dtype=np.float32)[labels]
    images = common.nhwc(ledger.expected("input.images"))
    weights = case.info["constructor"]["task_weight"]
    ce = losses.Objective({"ce": {}})
    pull = losses.Objective({"consistency": {"confidence": float(train["task_type"][2])}})

    def forward(model: Any, params: Any) -> Any:
        return model.apply({"params": params}, images, train=True, record=("features",))

    def loss(params: Any) -> Any:
        ours, theirs = (forward(built.model, params) for built in (student, teacher))
        parts = [ce.total(ce.evaluate(out, {"target": targets})) for out in (ours, theirs)]
        parts.append(pull.total(pull.evaluate(ours, {"target": one_hot, "teacher": theirs})))
        total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        return total, (ours, theirs, parts)

    step = jax.value_and_grad(loss, has_aux=True)
    (total, (ours, theirs, parts)), grads = common.run(step, student.variables["params"])
    probs = np.exp(ours.logits - ours.logits.max(axis=1, keepdims=True))
    ledger.close("train.logits_student", ours.logits)
    ledger.close("train.logits_teacher", theirs.logits)
    ledger.close("train.consistency", ((theirs.tokens.x[:, 0] - ours.tokens.x[:, 0]) ** 2).mean(axis=1))
    ledger.close("train.confidence", (probs / probs.sum(axis=1, keepdims=True) * one_hot).sum(axis=1))
    for name, part in zip(("student", "teacher", "consistency"), parts, strict=True):
        ledger.loss(f"train.loss.{name}", part)
    ledger.loss("train.loss.total", total)
    ledger.gradients("grads.safetensors", student.gradients(grads))
