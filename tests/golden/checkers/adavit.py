"""Kind `adavit_deit`: decisions about patches, heads and sub-layers, their losses, gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dyntoken import losses
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger

PARTS = ("head", "layer", "token")
TARGETS = {part: f"{part}_target_ratio" for part in PARTS}


def check(case: Case, ledger: Ledger) -> None:
    """Every recorded run with one set of weights; gradients are those of the first that trains."""
    present = {
        part: any(f"{part}_select." in key for key in case.tensors("weights.safetensors")) for part in PARTS
    }
    built, options = None, {}
    gradients = "grads.safetensors"
    for run, given in case.info["runs"].items():
        own = {**case.info["constructor"], **given}
        parts = {f"ada_{part}": present[part] for part in PARTS}
        tensors = case.tensors("weights.safetensors")
        if {part: bool(own.get(part)) for part in parts} != parts:
            parts = {part: bool(own.get(part)) for part in parts}
            tensors = _redrawn(tensors, case.info["seed"], parts)
            if tensors is None:
                for name in ledger.names(f"{run}."):
                    ledger.skip(name, "its weights are not recorded, and need torch to be drawn again")
                continue
        built = common.build(case, {**own, **parts}, tensors=tensors)
        options = {f"choose_{part}s": bool(own.get(f"ada_{part}")) for part in PARTS}
        options = {**dict(built.model.method_options), **options}
        model = built.model.clone(method_options=tuple(sorted(options.items())))
        images = common.nhwc(ledger.expected("input.images"))
        if ledger.names(f"{run}.eval."):
            out = common.evaluate(model, built.variables, images)
            ledger.close(f"{run}.eval.logits", out.logits)
            _check_choices(ledger, f"{run}.eval.", out)
            for block, rows in enumerate(out.records["blocks"]):
                ledger.offer(f"{run}.eval.block{block}.out", rows)
        if ledger.names(f"{run}.train."):
            _check_training(case, ledger, built, model, run, images, gradients)
            gradients = ""


def _redrawn(
    tensors: Mapping[str, np.ndarray], seed: int, parts: Mapping[str, bool]
) -> dict[str, np.ndarray] | None:
    """Weights of a run whose model lacks some policies of the recorded one; None without torch.

    Both models were filled from one seed, parameter after parameter in the order in which the class
    makes them: a normal draw, scaled and shifted, or a constant in its place.
    """
    try:
        import torch
    except ModuleNotFoundError:
        return None

    def draws(names):
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(tensors[name].shape, generator=generator).numpy() for name in names}

    names = sorted((name for name in tensors if name != "pos_embed"), key=_made)
    absent = tuple(f".{part.removeprefix('ada_')}_select." for part, there in parts.items() if not there)
    new = draws(name for name in names if not any(part in name for part in absent))
    first, found = draws(names), {"pos_embed": tensors["pos_embed"]}
    for name, draw in new.items():
        scale, shift = 0.0, tensors[name]
        if np.ptp(tensors[name]) > 0:
            scale, shift = np.polyfit(first[name].astype(np.float64).ravel(), tensors[name].ravel(), 1)
        found[name] = np.asarray(shift + scale * draw, np.float32)
    return found


def _made(name: str) -> tuple[int, ...]:
    """Where the official class makes a parameter."""
    parts = ("cls_token", "patch_embed", "blocks", "norm", "head")
    inside = ("norm1", "attn.query", "attn.key", "attn.value", "attn.proj", "attn.token_select", "norm2")
    inside += ("mlp.fc1", "mlp.fc2", "head_select", "layer_select")
    first, _, rest = name.partition(".")
    number, _, rest = rest.partition(".") if first == "blocks" else ("0", "", rest)
    within = next((at for at, part in enumerate(inside) if rest.startswith(part)), 0)
    return parts.index(first), int(number), within, int(name.endswith("bias"))


def _check_choices(ledger: Ledger, stem: str, out: Any) -> None:
    for part in PARTS:
        found = [c for c in out.state.choices if getattr(c, f"{part}s") is not None]
        chosen = [np.rint(getattr(c, f"{part}s")) for c in found]
        if ledger.holds(f"{stem}{part}_select"):
            ledger.equal(f"{stem}{part}_select", np.stack(chosen, axis=1).astype(np.int32))
        if ledger.holds(f"{stem}{part}_logits"):
            logits = np.stack([getattr(c, f"{part}_logits") for c in found], axis=1)
            ledger.close(
                f"{stem}{part}_logits", logits.reshape(ledger.expected(f"{stem}{part}_logits").shape)
            )


def _noise(ledger: Ledger, run: str, blocks: int) -> tuple[dict[str, np.ndarray], ...]:
    """The recorded draws, block by block."""
    found = []
    for block in range(blocks):
        stem = f"{run}.train.block{block}."
        names = {part: f"{stem}{part}_noise" for part in PARTS}
        draws = {f"{part}s": ledger.expected(name) for part, name in names.items() if ledger.holds(name)}
        if "tokens" in draws:
            draws["tokens"] = draws["tokens"][..., 0]
        found.append(draws)
    return tuple(found)


def _check_training(
    case: Case, ledger: Ledger, built: common.Built, model: Any, run: str, images: np.ndarray, gradients: str
) -> None:
    batch = {"image": images, "target": ledger.expected("input.targets")}
    noise = _noise(ledger, run, len(model.at))
    given = {"diversity": 0.1, "entropy": 0.1}
    specs: dict[str, Any] = {"ce": {}}
    for part in PARTS:
        if ledger.holds(f"{run}.train.loss.{part}_loss"):
            target = float(case.info["loss_arguments"][TARGETS[part]])
            more = {"minimum": 1.0} if part == "token" else given
            specs[f"usage#{part}"] = {"part": f"{part}s", "target": target, "weight": 2.0, **more}
    objective = losses.Objective(specs)

    def loss(params, batch):
        variables = {**built.variables, "params": params}
        out = model.apply(variables, batch["image"], train=True, noise=noise)
        pairs = objective.evaluate(out, batch)
        return objective.total(pairs), (out, {key: losses.average(*pair) for key, pair in pairs.items()})

    step = jax.value_and_grad(loss, has_aux=True)
    (value, (out, each)), grads = common.run(step, built.variables["params"], batch)
    stem = f"{run}.train."
    ledger.close(stem + "logits", out.logits)
    _check_choices(ledger, stem, out)
    ledger.loss(stem + "loss.base_loss", each["ce"])
    for part in PARTS:
        if f"usage#{part}" in each:
            ledger.loss(f"{stem}loss.{part}_loss", each[f"usage#{part}"])
    ledger.loss(stem + "loss.total", value)
    if gradients and case.has(gradients):
        found = built.gradients(grads)
        if "pos_embed" not in case.tensors(gradients):
            del found["pos_embed"]  # a fixed table there
        ledger.gradients(gradients, found)
