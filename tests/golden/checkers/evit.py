"""Class-attention methods: kinds `evit_deit` (two variants) and `etps_deit`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from dyntoken import losses, weights
from dyntoken.weights import official_isotropic
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Every recorded variant in every recorded run."""
    heads = {tuple(name.split(".")[:2]) for name in ledger.names("") if name.split(".")[0] != "input"}
    for variant in sorted({variant for variant, _ in heads}):
        built = common.build(case, constructor(case, variant))
        for run in sorted(run for other, run in heads if other == variant):
            if run == "train":
                _check_training(ledger, built, variant)
            elif run.startswith("eval"):
                _check_run(case, ledger, built, variant, run)
            else:
                ledger.fail(f"{variant}.{run}: unknown run")


def constructor(case: Case, variant: str) -> dict[str, Any]:
    """The case's constructor for one variant."""
    given = dict(case.info["constructor"])
    if variant in ("fuse", "nofuse"):
        given["fuse_token"] = variant == "fuse"
    elif variant != "etps":
        raise ValueError(f"unknown variant {variant!r}")
    return given


def _check_run(case: Case, ledger: Ledger, built: common.Built, variant: str, run: str) -> None:
    """An evaluation, also with call-time overrides or at another image size."""
    model, variables, images = built.model, built.variables, ledger.expected("input.images")
    runs, rates = case.info.get("runs", {}), _rates(case)
    if run == "eval_keep_rate_override":
        model = _clone(model, call_sites(rates, call=runs[run]))
    elif run == "eval_tokens_override":
        model = _clone(model, call_sites(rates, tokens=runs[run]))
    elif run == "eval_other_size":
        images = ledger.expected("input.images_other_size")
        grid = model.plain().grid
        model = common.with_options(model, img_size=images.shape[2:])
        variables, _ = weights.load_weights(model, variables, source_grid=grid, return_report=True)
    elif run != "eval":
        raise ValueError(f"unknown run {run!r}")
    out = common.evaluate(model, variables, common.nhwc(images))
    _check_output(ledger, f"{variant}.{run}.", model, out)
    _check_counts(case, ledger, variant, run, out)


def call_sites(rates: tuple[float, ...], call: Any = None, tokens: Any = None) -> dict[str, Any]:
    """`at` and `keep` of a call: a block prunes if its own rate and the call's are below 1, or by its count."""
    depth = len(rates)
    calls = call if isinstance(call, list) else [call] * depth
    counts = tokens if isinstance(tokens, list) else [tokens] * depth
    keep = {}
    for index, (own, rate, count) in enumerate(zip(rates, calls, counts, strict=True)):
        rate = own if rate is None else rate
        if count is not None or (own < 1 and rate < 1):
            keep[index] = float(rate) if count is None else int(count)
    return {"at": tuple(keep), "keep": tuple(keep.values())}


def _clone(model: Any, sites: dict[str, Any]) -> Any:
    return model.clone(**sites) if sites["at"] else model.clone(method=None, at=())


def _rates(case: Case) -> tuple[float, ...]:
    given = case.info["constructor"]
    return official_isotropic.per_block(given.get("keep_rate", (1,)), int(given.get("depth", 12)))


def _check_counts(case: Case, ledger: Ledger, variant: str, run: str, out: Any) -> None:
    """Rows after each site, from the case's own statistics."""
    key = {
        "eval": variant,
        "eval_keep_rate_override": f"{variant}.override",
        "eval_tokens_override": f"{variant}.tokens_override",
        "eval_other_size": f"{variant}.other_size",
    }[run]
    stats = case.info.get("runs", {}).get("stats", {})
    counts = stats.get(f"{key}.tokens_after_stage", stats.get(key, {}))
    counts = counts.get("tokens_after_stage", []) if isinstance(counts, dict) else counts
    if counts:
        ours = [reduction.place.shape[1] for reduction in out.reductions]
        ledger.equal(f"{variant}.{run} tokens_after_stage (case.json)", ours, counts)


def _check_output(ledger: Ledger, name: str, model: Any, out: Any) -> None:
    ledger.close(name + "logits", out.logits)
    prefix, count = out.tokens.prefix, out.tokens.initial
    ours = theirs = common.first_labels(len(out.logits), count)
    stage = 0  # as the reference numbers them: it passes over a site that would keep every token
    for site, reduction in enumerate(out.reductions):
        stem = f"{name}stage{stage}."
        if reduction.keep.shape[1] == ours.shape[1]:
            ours = common.outgoing(ours, reduction, -1)
            continue
        if not ledger.holds(stem + "keep_idx_local"):
            ledger.fail(f"{stem}: our model reduces here, the reference does not")
            return
        fused = count + stage
        kept, gone = _check_choice(ledger, stem, reduction, ours, theirs, count)
        before, after = out.records["stages"][site]
        both = np.concatenate([kept, gone], axis=1)
        ledger.offer(stem + "tokens_before", common.align(before, ours, both, prefix)[:, prefix:])
        if ledger.holds(stem + "host_idx_orig"):
            host = np.take_along_axis(reduction.host, common.positions(gone, ours), axis=1)
            ledger.equal(stem + "host_idx_orig", host)
            ledger.equal(stem + "host_idx_local", common.positions(host, kept))
        ours = common.outgoing(ours, reduction, fused)
        ledger.equal(stem + "place (ours)", reduction.place, np.where(ours < count, ours, -1))
        extra = np.full((len(kept), ours.shape[1] - kept.shape[1]), fused)
        theirs = np.concatenate([kept, extra], axis=1)
        ledger.offer(stem + "tokens_kept", common.align(after, ours, theirs, prefix))
        block = out.records["blocks"][model.at[site]]
        ledger.offer(stem + "block_out", common.align(block, ours, theirs, prefix))
        stage += 1
    ledger.offer(name + "features", common.align(out.tokens.x, ours, theirs, prefix))


def _check_choice(
    ledger: Ledger, stem: str, reduction: Any, ours: np.ndarray, theirs: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and index sets; returns the reference's kept and dropped labels in its order."""
    ledger.close(stem + "cls_attn", common.align(reduction.scores, ours, theirs))
    keep = reduction.keep
    drop = common.complement(keep, ours.shape[1])
    for what, index in (("keep", keep), ("drop", drop)):
        labels = common.take(ours, index)
        ledger.same_sets(f"{stem}{what}_idx_local", common.positions(labels, theirs))
        ledger.same_sets(f"{stem}{what}_idx_orig", np.where(labels < count, labels, -1))
    kept, gone = (
        common.take(theirs, ledger.expected(f"{stem}{what}_idx_local")) for what in ("keep", "drop")
    )
    return kept, gone


def _check_training(ledger: Ledger, built: common.Built, variant: str) -> None:
    images = common.nhwc(ledger.expected("input.images"))
    batch = {"image": images, "target": ledger.expected("input.soft_targets")}
    specs = {"ce": {}}

    def loss(params, batch):
        variables = {**built.variables, "params": params}
        out = built.model.apply(variables, batch["image"], train=True, record=common.RECORD)
        return (objective := losses.Objective(specs)).total(objective.evaluate(out, batch)), out

    step = jax.value_and_grad(loss, has_aux=True)
    (value, out), grads = common.run(step, built.variables["params"], batch)
    _check_output(ledger, f"{variant}.train.", built.model, out)
    ledger.loss(f"{variant}.train.loss.ce", value)
    ledger.gradients(f"grads_{variant}.safetensors", built.gradients(grads))
