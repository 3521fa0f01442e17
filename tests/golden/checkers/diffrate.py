"""DiffRate: kind `diffrate_deit`, given counts and the training of learnt ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from dyntoken import losses
from dyntoken.losses.budget import blocks_multiply_adds
from dyntoken.nn.attention import Attention
from dyntoken.reducers import diffrate
from tests.golden.case import Case
from tests.golden.checkers import common, merging
from tests.golden.ledger import Ledger

PARTS = {"prune": "prune_ddp", "merge": "merge_ddp"}


def check(case: Case, ledger: Ledger) -> None:
    """Every recorded run, the learnt counts, and the training step."""
    for name, run in case.info["runs"].items():
        _check_run(case, ledger, name, run)
    _check_learnt(case, ledger)
    if ledger.names("train."):
        _check_training(case, ledger)


def _check_run(case: Case, ledger: Ledger, name: str, run: dict[str, Any]) -> None:
    counts = [min(p, m) - 1 for p, m in zip(run["prune_kept"], run["merge_kept"], strict=True)]
    first = int(case.info["constructor"]["img_size"] // case.info["constructor"]["patch_size"]) ** 2
    keep = tuple(int(n) for n in np.minimum.accumulate([min(first, counts[0]), *counts[1:]]))
    prune = tuple(int(p) - 1 for p in run["prune_kept"])
    built = _dense(case, keep=keep, prune=prune, reference=True)
    images = common.nhwc(ledger.expected("input.images"))
    out, state = common.captured(built, images, (Attention, diffrate.DiffRate))
    trunk, prefix = state["trunk"], out.tokens.prefix
    ledger.close(f"{name}.logits", out.logits)
    ledger.equal(f"{name}.source", merging.source(out.tokens.carrier, out.tokens.count, prefix))
    ledger.offer(f"{name}.size", merging.with_prefix(out.tokens.key_weight, prefix, 1.0))
    for block, reduction in enumerate(out.reductions):
        stem, before = f"{name}.block{block}.", out.records["stages"][block][0][:, prefix:]
        order = np.argsort(-reduction.scores, axis=1, kind="stable")
        ledger.offer(stem + "cls_attn", reduction.scores)
        if ledger.holds(stem + "order"):
            ledger.equal(stem + "order", order)
        if ledger.holds(stem + "merge_dst"):
            source = order[:, keep[block] : prune[block]]
            ledger.equal(stem + "merge_dst", common.take(reduction.remap, source) + prefix)
            unit = before / np.linalg.norm(before, axis=-1, keepdims=True)
            host = common.take(reduction.keep, common.take(reduction.remap, source))
            ledger.close(
                stem + "merge_cos", (common.take(unit, source) * common.take(unit, host)).sum(axis=-1)
            )
        ledger.offer(stem + "out", out.records["blocks"][block])
        tokens, _ = trunk[f"reducer_{block}"]["__call__"][0]
        ledger.offer(stem + "size", merging.with_prefix(tokens.key_weight, prefix, 1.0))
    left = [reduction.count + prefix for reduction in out.reductions]
    ledger.offer(
        f"{name}.flops", np.float64(_outside(built.model) + _blocks(built.model, left, first + prefix))
    )


def _outside(model: Any) -> int:
    """Multiply-adds of head and patch embedding as the official code counts them, the class token included."""
    body, (rows, columns) = model.plain(), model.plain().grid
    patch = np.prod([side // n for side, n in zip(model.input_shape[:2], (rows, columns), strict=True)])
    return int(
        (rows * columns + body.prefix) * body.width * patch * body.in_chans + body.width * model.num_classes
    )


def _blocks(model: Any, left: list[int], rows: int) -> int:
    width, total = model.plain().width, 0
    for after in left:
        total += 4 * rows * width**2 + 2 * rows**2 * width + 8 * after * width**2
        rows = after
    return total


def _dense(case: Case, **options: Any) -> common.Built:
    """Without the parameters of the counts."""
    plain = _Plain(case)
    return merging.build(plain, "diffrate", **options)


class _Plain(Case):
    """The case without the tensors of learnt counts."""

    def __init__(self, case: Case):
        super().__init__(case.folder)

    def tensors(self, file: str) -> dict[str, np.ndarray]:
        return {key: value for key, value in super().tensors(file).items() if "_ddp." not in key}


def _learning(case: Case) -> common.Built:
    """The model that learns, with the recorded probabilities."""
    dense = _dense(case)
    granularity = {case.info["constructor"][f"{part}_granularity"] for part in PARTS}
    if len(granularity) != 1:
        raise ValueError("prune and merge candidates have one step")
    options = {**dict(dense.model.method_options), "learn": True, "granularity": granularity.pop()}
    model = dense.model.clone(method_options=tuple(sorted(options.items())))
    tensors = case.tensors("weights.safetensors")
    trunk = dict(dense.variables["params"]["backbone"]["trunk"])
    for stage, at in enumerate(model.at):
        keys = {name: f"blocks.{at}.{part}.selected_probability" for name, part in PARTS.items()}
        trunk[f"reducer_{stage}"] = {name: tensors[key] for name, key in keys.items()}
    params = {**dense.variables["params"]}
    params["backbone"] = {**params["backbone"], "trunk": trunk}
    return dataclasses.replace(dense, model=model, variables={"params": params})


def _check_learnt(case: Case, ledger: Ledger) -> None:
    built = _learning(case)
    found = diffrate.learnt_counts(built.model, built.variables["params"])
    for run in [run for name, run in case.info["runs"].items() if name.startswith("learned")]:
        ledger.same("learnt keep (case.json)", list(found["keep"]), [m - 1 for m in run["merge_kept"]])
        ledger.same("learnt prune (case.json)", list(found["prune"]), [p - 1 for p in run["prune_kept"]])
    if ledger.holds("learned.kept_probability"):
        trunk = built.variables["params"]["backbone"]["trunk"]
        means = [
            [diffrate.mean_count(trunk[f"reducer_{s}"][name], *_candidates(built, s)) for name in PARTS]
            for s in range(len(built.model.at))
        ]
        ledger.close("learned.kept_probability", np.asarray(means))


def _candidates(built: common.Built, stage: int) -> tuple[int, int, int]:
    rows, columns = built.model.plain().grid
    return rows * columns, built.model.sites()[stage].reducer["granularity"], built.model.at[stage]


def _check_training(case: Case, ledger: Ledger) -> None:
    built, given = _learning(case), case.info["constructor"]
    images, targets = common.nhwc(ledger.expected("input.images")), ledger.expected("input.targets")
    gmacs = given["target_gflops"] - _outside(built.model) / 1e9
    objective = losses.Objective(
        {"ce": {}, "multiply_adds": {"gmacs": gmacs, "weight": given["lambda_flops"]}}
    )

    def loss(params: Any) -> Any:
        out = built.model.apply({"params": params}, images, train=True, record=("features",))
        parts = objective.evaluate(out, {"target": targets})
        flops = blocks_multiply_adds(out, out.tokens.x.shape[-1], out.tokens.prefix)
        return objective.total(parts), (out, parts, flops)

    (total, (out, parts, flops)), grads = common.run(
        jax.value_and_grad(loss, has_aux=True), built.variables["params"]
    )
    prefix = out.tokens.prefix
    ledger.close("train.logits", out.logits)
    ledger.close("train.mask", merging.with_prefix(out.tokens.alive, prefix, 1.0))
    ledger.close("train.size", merging.with_prefix(out.tokens.key_weight, prefix, 1.0))
    ledger.close("train.flops", flops + np.float32(_outside(built.model)))
    for name, key in (("ce", "ce"), ("flops", "multiply_adds")):
        ledger.loss(f"train.loss.{name}", parts[key][0] / parts[key][1])
    ledger.loss("train.loss.total", total)
    trunk = dict(grads["backbone"]["trunk"])
    learnt = {
        f"blocks.{at}.{part}.selected_probability": trunk[f"reducer_{stage}"][name]
        for stage, at in enumerate(built.model.at)
        for name, part in PARTS.items()
    }
    plain = {name: value for name, value in trunk.items() if not name.startswith("reducer_")}
    rest = {**grads, "backbone": {**grads["backbone"], "trunk": plain}}
    ledger.gradients("grads.safetensors", {**built.gradients(rest), **learnt})
