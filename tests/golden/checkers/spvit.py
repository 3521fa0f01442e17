"""SPViT: kind `spvit_deit`."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np

from dyntoken import losses
from dyntoken.reducers.predictor import HeadPredictor
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Both recorded runs sample with the recorded noise, in mask form."""
    built = common.build(case, case.info["constructor"])
    images = common.nhwc(ledger.expected("input.images"))
    sites = len(built.model.at)
    noise = tuple(ledger.expected(f"noise.stage{stage}.gumbel") for stage in range(sites))
    teacher = _check_teacher(case, ledger, images)
    _check_evaluation(ledger, built, images, noise)
    _check_training(case, ledger, built, images, noise, teacher)


def _check_teacher(case: Case, ledger: Ledger, images: np.ndarray) -> Any:
    given = {
        name: value
        for name, value in case.info["constructor"].items()
        if name not in ("pruning_loc", "token_ratio", "distill", "mse_token")
    }
    teacher = common.build(
        case, given, repository="timm", cls="VisionTransformer", file="teacher.safetensors"
    )
    out = common.evaluate(teacher.model, teacher.variables, images)
    ledger.close("teacher.logits", out.logits)
    _offer_rows(ledger, "teacher.tokens", out.tokens.patches)
    return out


def _offer_rows(ledger: Ledger, name: str, rows: Any) -> None:
    """Rows `[B, n, C]` of which the case may record every so many."""
    if ledger.holds(name):
        shown = ledger.case.info["arrays"][name]["what"]
        step = re.search(r"every (\d+)", shown)
        ledger.close(name, np.asarray(rows)[:, :: int(step[1]) if step else 1])


def _forward(built: common.Built, params: Any, images: Any, noise: Any, train: bool) -> tuple[Any, Any]:
    out, state = built.model.clone(form="mask").apply(
        {**built.variables, "params": params},
        images,
        train=train,
        noise=noise,
        record=common.RECORD,
        capture_intermediates=lambda module, _: isinstance(module, HeadPredictor),
        mutable=["intermediates"],
    )
    found = state["intermediates"]["backbone"]["trunk"]
    scored = [
        found[f"reducer_{stage}"]["head_predictor"]["__call__"][0] for stage in range(len(built.model.at))
    ]
    return out, scored


def _check_evaluation(ledger: Ledger, built: common.Built, images: np.ndarray, noise: Any) -> None:
    """What rows that are gone look like depends on their attention to themselves, as only training has it."""
    run = common.run(
        lambda v, x, n: [_forward(built, v["params"], x, n, train) for train in (False, True)],
        built.variables,
        images,
        noise,
    )
    (exact, scored), official = run
    ledger.close("eval.logits", exact.logits)
    for stage, (score, keep) in enumerate(scored):
        name = f"eval.stage{stage}."
        alive = np.ones(score.shape[:2], bool)
        if stage:
            alive = np.concatenate([exact.reductions[stage - 1].decision > 0.5, alive[:, :1]], axis=1)
        for what, ours in (("score", score), ("keep_probability", keep)):
            mask = alive.reshape(alive.shape + (1,) * (ours.ndim - 2))
            theirs = np.where(mask, ledger.expected(name + what), 0.0)
            ledger.close(f"{name}{what} (rows alive)", np.where(mask, ours, 0.0), expected=theirs)
        package = exact.records["stages"][stage][1][:, -1]
        ledger.close(f"{name}package (evaluation)", package, expected=ledger.expected(name + "package"))
    _check_stages(ledger, "eval.", built, *official)


def _check_stages(ledger: Ledger, run: str, built: common.Built, out: Any, scored: Any) -> None:
    for stage, (score, keep) in enumerate(scored):
        name = f"{run}stage{stage}."
        ledger.close(name + "score", score)
        ledger.close(name + "keep_probability", keep)
        ledger.close(name + "package", out.records["stages"][stage][1][:, -1])
        if ledger.holds(name + "keep"):
            patches = out.reductions[stage].decision[:, : out.tokens.initial]
            ledger.equal(name + "keep", np.round(patches).astype(np.int32))
        _offer_rows(ledger, name + "block_out", out.records["blocks"][built.model.at[stage]])


def _check_training(
    case: Case, ledger: Ledger, built: common.Built, images: np.ndarray, noise: Any, teacher: Any
) -> None:
    variant = "mse" if case.info["constructor"].get("mse_token") else "kl"
    specs = {
        "ce": {},
        "keep_ratio": {"weight": 2.0, "dynamic": True},
        "logit_kl": {"weight": 0.5},
        "token_distill": {"weight": 0.5, "variant": variant},
    }
    objective = losses.Objective(specs)
    batch = {"image": images, "target": ledger.expected("input.targets"), "teacher": teacher}

    def loss(params, batch, noise):
        out, scored = _forward(built, params, batch["image"], noise, True)
        pairs = objective.evaluate(out, batch)
        values = {key: losses.average(*pair) for key, pair in pairs.items()}
        return objective.total(pairs), (out, scored, values)

    step = jax.value_and_grad(loss, has_aux=True)
    (total, (out, scored, values)), grads = common.run(step, built.variables["params"], batch, noise)
    ledger.close("train.logits", out.logits)
    _check_stages(ledger, "train.", built, out, scored)
    _offer_rows(ledger, "train.features", out.tokens.patches[:, : out.tokens.initial])
    ledger.loss("train.loss.ce", values["ce"])
    ledger.loss("train.loss.ratio", values["keep_ratio"] * len(built.model.at))
    ledger.loss("train.loss.kl", values["logit_kl"])
    ledger.loss("train.loss.token", values["token_distill"])
    ledger.loss("train.loss.total", total)
    ledger.gradients("grads.safetensors", built.gradients(grads))
