"""DynamicViT on a grid: kinds `dyswin` and `dyconvnext`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken import losses
from dyntoken.backbones.staged_dual_path import SPARSE_STAGE
from dyntoken.types import Output, Tokens
from tests.golden.case import Case
from tests.golden.checkers import common, dynamicvit
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Evaluation in both forms, training in mask form with the recorded noise."""
    images = common.nhwc(ledger.expected("input.images"))
    built = common.build(case, _sized(case.info["constructor"], images))
    _check_teacher(case, ledger, images)
    _check_evaluation(case, ledger, built, images)
    if ledger.names("train."):
        _check_training(case, ledger, built, images)


def _sized(constructor: Mapping[str, Any], images: np.ndarray) -> dict[str, Any]:
    """A constructor that says the image size; the convolutional classes take any."""
    return {"img_size": list(images.shape[1:3]), **constructor}


def _check_teacher(case: Case, ledger: Ledger, images: np.ndarray) -> None:
    if not case.has("teacher.safetensors"):
        return
    given = _sized(case.info["teacher_constructor"], images)
    usual = {"dyswin": "SwinTransformer_Teacher", "dyconvnext": "ConvNeXt_Teacher"}[case.kind]
    cls = case.info.get("reference", {}).get("teacher_class", usual)
    teacher = common.build(case, given, cls=cls, file="teacher.safetensors")
    out = common.evaluate(teacher.model, teacher.variables, images)
    ledger.offer("teacher.logits", out.logits)
    _offer_map(ledger, "teacher.features", out.tokens.patches)


def _offer_map(ledger: Ledger, name: str, cells: np.ndarray) -> None:
    """Cells `[B, N, C]`; a case may hold them as `[B, H, W, C]`."""
    if ledger.holds(name):
        theirs = ledger.expected(name)
        ledger.close(name, cells, expected=theirs.reshape(len(theirs), -1, theirs.shape[-1]))


def _own_blocks(built: common.Built, out: Output) -> list[Any]:
    """Records of the blocks of the third stage."""
    depths = built.model.plain().depths
    first = sum(depths[:SPARSE_STAGE])
    return list(out.records["blocks"][first : first + depths[SPARSE_STAGE]])


def _check_evaluation(case: Case, ledger: Ledger, built: common.Built, images: np.ndarray) -> None:
    out = common.evaluate(built.model.clone(form="gather"), built.variables, images)
    masked = common.evaluate(built.model.clone(form="mask"), built.variables, images)
    ledger.offer("eval.logits", out.logits)
    ledger.close("eval.logits", masked.logits)
    depths = built.model.plain().depths
    before = out.records["blocks"][sum(depths[:SPARSE_STAGE]) - 1]
    ledger.offer("eval.stage3.tokens_in", common.shrunk(built, SPARSE_STAGE, before))
    for stage, reduction in enumerate(out.reductions):
        name = f"eval.stage{stage}."
        ledger.offer(name + "scores_log", reduction.log_probs)
        ledger.same_sets(name + "keep_idx", reduction.keep)
        ledger.same_sets(name + "drop_idx", common.complement(reduction.keep, reduction.decision.shape[1]))
    for index, block in enumerate(_own_blocks(built, out)):
        ledger.offer(f"eval.sparse_block{index}.out", block)
    _offer_map(ledger, "eval.features", out.tokens.patches)
    ledger.offer("eval.pooled", out.tokens.x[:, 0])
    if "keep_counts" in case.info:
        counts = [reduction.keep.shape[1] for reduction in out.reductions]
        ledger.equal("keep_counts (case.json)", counts, case.info["keep_counts"])


def _teacher(ledger: Ledger, model: Any) -> Output:
    """The recorded teacher, so that its rounding does not enter our losses."""
    features = jnp.asarray(ledger.expected("teacher.features"))
    features = features.reshape(len(features), -1, features.shape[-1])
    tokens = Tokens.start(features, prefix=0, grid=model.plain().grid)
    return Output(logits=jnp.asarray(ledger.expected("teacher.logits")), tokens=tokens)


def _check_training(case: Case, ledger: Ledger, built: common.Built, images: np.ndarray) -> None:
    model, sites = built.model, len(built.model.at)
    noise = tuple(ledger.expected(f"train.stage{s}.gumbel") for s in range(sites))
    specs = dynamicvit.loss_specs(case, ledger, "token_distill")
    specs["keep_ratio"]["divisor"] = float(sites)  # the number of decisions, 3 in the text's example
    batch = {"image": images, "target": ledger.expected("input.soft_targets")}
    if ledger.holds("teacher.logits"):
        batch["teacher"] = _teacher(ledger, model)

    def loss(params, batch, noise):
        out = model.apply(
            {"params": params}, batch["image"], train=True, noise=noise, record=common.records(model)
        )
        pairs = losses.Objective(specs).evaluate(out, batch)
        values = {key: losses.average(*pair) for key, pair in pairs.items()}
        values["ratio_sum"] = losses.average(*losses.LOSSES["keep_ratio"](out, batch, divisor=1.0))
        return losses.Objective(specs).total(pairs), (out, values)

    step = jax.value_and_grad(loss, has_aux=True)
    (total, (out, values)), grads = common.run(step, built.variables["params"], batch, noise)
    ledger.offer("train.logits", out.logits)
    _offer_map(ledger, "train.features", out.tokens.patches)
    for stage, reduction in enumerate(out.reductions):
        ledger.offer(f"train.stage{stage}.scores_log", reduction.log_probs)
        ledger.offer(f"train.stage{stage}.decision", reduction.decision, dynamicvit.DECISION)
    for index, block in enumerate(_own_blocks(built, out)):
        if isinstance(block, tuple):
            ledger.offer(f"train.sparse_block{index}.slow", block[0])
            ledger.offer(f"train.sparse_block{index}.fast", block[1])
    found = {"ce": values["ce"], "ratio": values["ratio_sum"], "total": total}
    if "logit_kl" in values:
        found |= {"cls_kl": values["logit_kl"], "token": values["token_distill"]}
    for key, value in found.items():
        if ledger.holds(f"train.loss.{key}"):
            ledger.loss(f"train.loss.{key}", value)
    ledger.gradients("grads.safetensors", built.gradients(grads))
