"""Learnt predictors: kinds `dynamicvit_deit`, `dynamicvit_tps_repo`, `dtps_deit`, `dylvvit`."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken import losses
from dyntoken.types import Output, Tokens
from dyntoken.weights.official import OFFICIAL
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger

DECISION = 1e-6  # hard decisions are 0 or 1 up to the rounding of the straight-through sum


def check(case: Case, ledger: Ledger) -> None:
    """Evaluation in gather form, training in mask form with the recorded noise."""
    built = common.build(case, constructor(case))
    images = common.nhwc(ledger.expected("input.images"))
    _check_teacher(case, ledger, images)
    _check_evaluation(case, ledger, built, images)
    _check_training(case, ledger, built, images)


def constructor(case: Case) -> dict[str, Any]:
    """The case's constructor, with the squeezing module that `reference` names."""
    given = dict(case.info["constructor"])
    module = case.info.get("reference", {}).get("token_merge_module")
    if module is not None:
        given.setdefault("token_merge_module", module)
    return given


def _check_teacher(case: Case, ledger: Ledger, images: np.ndarray) -> None:
    if not case.has("teacher.safetensors"):
        return
    given = dict(case.info["teacher_constructor"])
    cls, repository = case.info.get("reference", {}).get("teacher_class", "VisionTransformerTeacher"), None
    if "other" in given:  # "as the student": what the student's description and the weights say
        given.pop("other")
        student = {
            k: v
            for k, v in case.info["constructor"].items()
            if k in OFFICIAL["timm/VisionTransformer"].arguments
        }
        given = {**student, **_seen(case.tensors("teacher.safetensors")), **given}
    if case.info["repository"].startswith("megvii"):  # its teacher is timm's plain ViT
        cls, repository = "VisionTransformer", "timm"
    teacher = common.build(case, given, repository=repository, cls=cls, file="teacher.safetensors")
    out = common.evaluate(teacher.model, teacher.variables, images)
    ledger.offer("teacher.logits", out.logits)
    ledger.offer("teacher.features", _features(out))


def _features(out: Output) -> Any:
    """What token distillation compares: final rows, or LV-ViT's auxiliary logits."""
    return out.tokens.patches if out.dense is None else out.dense


def _seen(tensors: dict[str, np.ndarray]) -> dict[str, bool]:
    """Arguments that a state dict shows."""
    rows = tensors["pos_embed"].shape[1]
    return {"qkv_bias": "blocks.0.attn.qkv.bias" in tensors, "no_embed_class": math.isqrt(rows) ** 2 == rows}


def _check_evaluation(case: Case, ledger: Ledger, built: common.Built, images: np.ndarray) -> None:
    out = common.evaluate(built.model, built.variables, images)
    ledger.offer("eval.logits", out.logits)
    ledger.offer("eval.embed", out.records["embed"])
    prefix, count = out.tokens.prefix, out.tokens.initial
    ours = theirs = common.first_labels(len(images), count)
    for stage, reduction in enumerate(out.reductions):
        name = f"eval.stage{stage}."
        before, after = out.records["stages"][stage]
        ledger.offer(name + "scores_log", common.align(reduction.log_probs, ours, theirs))
        ledger.offer(name + "tokens_in", common.align(before, ours, theirs, prefix))
        kept = common.take(ours, reduction.keep)
        dropped = common.take(ours, common.complement(reduction.keep, ours.shape[1]))
        ledger.same_sets(name + "keep_idx_orig", kept)
        ledger.same_sets(name + "keep_idx_local", common.positions(kept, theirs))
        ledger.same_sets(name + "drop_idx_orig", dropped)
        if ledger.holds(name + "host_idx_orig"):
            _check_hosts(ledger, name, reduction, ours, before[:, prefix:])
        ours = common.outgoing(ours, reduction, fused=count + stage)
        ledger.equal(name + "place (ours)", reduction.place, ours)
        theirs = ledger.expected(name + "keep_idx_orig")
        ledger.offer(name + "tokens_kept", common.align(after, ours, theirs, prefix))
        block = out.records["blocks"][built.model.at[stage]]
        ledger.offer(name + "block_out", common.align(block, ours, theirs, prefix))
    ledger.offer("eval.features", common.align(out.tokens.x, ours, theirs, prefix))
    if out.dense is not None:
        ledger.offer("eval.logits_aux", common.align(out.dense, ours, theirs))
        silent = common.with_options(built.model, aux_weight=0.0)  # then the class token alone decides
        ledger.offer("eval.logits_cls", common.evaluate(silent, built.variables, images).logits)
    if "keep_counts" in case.info:
        counts = [reduction.keep.shape[1] for reduction in out.reductions]
        ledger.equal("keep_counts (case.json)", counts, case.info["keep_counts"])


def _check_hosts(ledger: Ledger, name: str, reduction: Any, labels: np.ndarray, rows: np.ndarray) -> None:
    """Host of each dropped token, in the order of the reference's `drop_idx_orig`."""
    dropped, kept = (ledger.expected(name + f"{what}_idx_orig") for what in ("drop", "keep"))
    index = common.positions(dropped, labels)
    host = np.take_along_axis(reduction.host, index, axis=1)
    ledger.equal(name + "host_idx_orig", host)
    if ledger.holds(name + "host_idx_local"):
        ledger.equal(name + "host_idx_local", common.positions(host, kept))
    if ledger.holds(name + "host_sim"):
        unit = rows / (np.linalg.norm(rows, axis=-1, keepdims=True) + 1e-6)
        at = common.positions(host, labels)
        ledger.offer(name + "host_sim", (common.take(unit, index) * common.take(unit, at)).sum(-1))


def loss_specs(case: Case, ledger: Ledger, token: str) -> dict[str, dict[str, Any]]:
    """The official total: loss list with weights, from the case's own description."""
    text = case.info["details"]["loss"]

    def weight(term: str, default: float | None = None) -> float:
        found = re.search(rf"([0-9.]+)\s*\*\s*{term}", text)
        if not found and default is None:
            raise ValueError(f"the case's loss is not understood: {text!r}")
        return float(found.group(1)) if found else default

    specs: dict[str, dict[str, Any]] = {
        "ce": {"weight": weight("CE", 1.0)},
        "keep_ratio": {"weight": weight("ratio")},
    }
    divisor = re.search(r"ratio\s*/\s*([0-9]+)", text)
    if divisor:
        specs["keep_ratio"]["divisor"] = float(divisor.group(1))
    if ledger.holds("train.loss.cls_kl"):
        distill = weight(r"\(?KL")
        specs["logit_kl"] = {"weight": distill}
        specs[token] = {
            "weight": distill,
            "variant": "mse" if re.search(r"\bMSE\b", text) else "kl",
        }
    return specs


def _teacher(ledger: Ledger, model: Any) -> Output:
    """The recorded teacher, so that its rounding does not enter our losses."""
    features = jnp.asarray(ledger.expected("teacher.features"))
    tokens = Tokens.start(features, prefix=0, grid=model.plain().grid)
    dense = features if model.aux_weight is not None else None
    return Output(logits=jnp.asarray(ledger.expected("teacher.logits")), tokens=tokens, dense=dense)


def _check_training(case: Case, ledger: Ledger, built: common.Built, images: np.ndarray) -> None:
    model, sites = built.model, len(built.model.at)
    noise = tuple(ledger.expected(f"train.stage{s}.gumbel") for s in range(sites))
    token = "token_distill" if model.aux_weight is None else "dense_distill"
    specs = loss_specs(case, ledger, token)
    batch = {"image": images, "target": ledger.expected("input.soft_targets")}
    if ledger.holds("teacher.logits"):
        batch["teacher"] = _teacher(ledger, model)
    variants = {  # every other loss value that the cases record, unweighted
        "ratio_sum": ("keep_ratio", {"divisor": 1.0}),
        "ratio_mean": ("keep_ratio", {}),
        "dynamic": ("keep_ratio", {"divisor": 1.0, "dynamic": True}),
    }
    if "teacher" in batch:
        variants |= {variant: (token, {"variant": variant}) for variant in ("mse", "kl")}

    def loss(params, batch, noise):
        variables = {**built.variables, "params": params}
        out, statistics = model.apply(
            variables,
            batch["image"],
            train=True,
            noise=noise,
            record=common.records(model),
            mutable=["batch_stats"],
        )
        pairs = losses.Objective(specs).evaluate(out, batch)
        values = {key: losses.average(*pair) for key, pair in pairs.items()}
        for key, (name, options) in variants.items():
            values[key] = losses.average(*losses.LOSSES[name](out, batch, **options))
        return losses.Objective(specs).total(pairs), (out, values, statistics)

    step = jax.value_and_grad(loss, has_aux=True)
    (total, (out, values, statistics)), grads = common.run(step, built.variables["params"], batch, noise)
    _check_streams(ledger, built, out)
    _check_losses(ledger, specs, token, total, values)
    _check_statistics(ledger, built, statistics)
    ledger.gradients("grads.safetensors", built.gradients(grads))


def _check_streams(ledger: Ledger, built: common.Built, out: Any) -> None:
    ledger.offer("train.logits", out.logits)
    ledger.offer("train.features", _features(out))
    ledger.offer("train.last_decision", out.reductions[-1].decision, DECISION)
    previous = np.ones_like(out.reductions[0].decision)
    for stage, reduction in enumerate(out.reductions):
        name = f"train.stage{stage}."
        ledger.offer(name + "scores_log", reduction.log_probs)
        ledger.offer(name + "decision", reduction.decision, DECISION)
        ledger.offer(name + "block_out", out.records["blocks"][built.model.at[stage]])
        ledger.offer(name + "tokens_squeezed", out.records["stages"][stage][1])
        if ledger.holds(name + "host_idx"):
            pruned = (previous > 0.5) & (reduction.decision < 0.5)
            ledger.equal(name + "host_idx", np.where(pruned, reduction.host, -1))
        previous = reduction.decision


def _check_statistics(ledger: Ledger, built: common.Built, statistics: Any) -> None:
    """BatchNorm's running statistics after the training forward."""
    after, before = (
        {f"train.bn.{key}": value for key, value in built.gradients({"params": {}, **tree}).items()}
        for tree in (statistics, {name: built.variables[name] for name in statistics})
    )
    recorded = [name for name in after if ledger.holds(name)]
    if recorded and all(np.array_equal(ledger.expected(name), before[name]) for name in recorded):
        # Nothing then says what they were before it; tests/nn/test_batchnorm.py pins the update.
        ledger.note(
            "the case's weights were saved after its training forward: running statistics as imported"
        )
        after = before
    for name in recorded:
        ledger.close(name, after[name])


def _check_losses(
    ledger: Ledger, specs: dict[str, Any], token: str, total: Any, values: dict[str, Any]
) -> None:
    """Terms by their names in the two repositories' cases."""
    ratio = specs["keep_ratio"]
    found = {"ce": values["ce"], "total": total}
    if "divisor" in ratio:  # DynamicViT: the sum over stages, unweighted
        found |= {"ratio": values["ratio_sum"], "ratio_dynamic": values["dynamic"]}
    else:  # TPS: the mean over stages
        found |= {"ratio": values["ratio_mean"], "ratio_weighted": ratio["weight"] * values["ratio_mean"]}
    if "logit_kl" in specs:
        weight, variant = specs[token]["weight"], specs[token]["variant"]
        other = "kl" if variant == "mse" else "mse"
        found |= {
            "cls_kl": values["logit_kl"],
            "token": values[variant],
            "token_alt": values[other],
            f"token_{other}": values[other],
            "total_alt": total + weight * (values[other] - values[variant]),
            "distill_weighted": weight * (values["logit_kl"] + values[variant]),
        }
    for key, value in found.items():
        if ledger.holds(f"train.loss.{key}"):
            ledger.loss(f"train.loss.{key}", value)
