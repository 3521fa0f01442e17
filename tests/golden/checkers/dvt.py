"""DVT cascades: kinds `dvt_deit` and `dvt_t2t`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken import losses, weights
from dyntoken.types import Output
from dyntoken.weights import keys
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger

RECORD = ("embed", "blocks", "relations", "context", "maps", "biases")


def check(case: Case, ledger: Ledger) -> None:
    """Logits, tokens, features and what is reused at every exit; loss and gradients where recorded."""
    built = common.build(case, {**case.info["config"], **case.info["constructor"]["wrapper"]})
    images = common.nhwc(ledger.expected("x"))
    forward = lambda v, x: built.model.apply(v, x, record=RECORD)  # noqa: E731
    out = common.run(forward, built.variables, images)
    for index, name in enumerate(keys.DVT_EXITS):
        _check_exit(case, ledger, built, out, index, name)
    if ledger.holds("loss/total"):
        _check_loss(ledger, built, images)


def _check_exit(case: Case, ledger: Ledger, built: common.Built, out: Any, index: int, name: str) -> None:
    records = {what: values[index] for what, values in out.records.items()}
    positions = built.variables["params"][f"exit_{index}"]["backbone"]["pos_embed"]
    ledger.offer(f"logits/{name}", out.logits[index])
    ledger.offer(f"tokens/{name}", records["embed"][:, 1:] - np.asarray(positions)[:, 1:])
    ledger.offer(f"features/{name}", records["blocks"][-1])
    relations = np.stack(records["relations"], axis=1)  # [B, L, H, T, T]
    ledger.offer(f"relations/{name}", relations)
    ledger.offer(f"relations_sample0/{name}", relations[0])
    if records["context"]:
        ledger.offer(f"context/{name}", np.stack(records["context"], axis=1))
    if records["maps"]:
        ledger.offer(f"relation_mlp_sample0/{name}", np.concatenate(records["maps"], axis=1)[0])
        biases = np.stack(records["biases"], axis=1)
        ledger.offer(f"relations_upsampled_sample0/{name}", biases[0])
        chosen = [biases[tuple(where)] for where in case.info["record"].get("rel_sel", [])]
        if chosen:
            ledger.offer(f"relations_upsampled_sel/{name}", np.stack(chosen))


def _check_loss(ledger: Ledger, built: common.Built, images: np.ndarray) -> None:
    batch = {"image": images, "target": ledger.expected("soft_targets")}

    def loss(params, batch):
        out = built.model.apply({"params": params}, batch["image"])
        each = [losses.LOSSES["ce"](Output(logits=logits), batch) for logits in out.logits]
        each = jnp.stack([losses.average(*pair) for pair in each])
        return each.sum(), each

    (total, each), grads = common.run(
        jax.value_and_grad(loss, has_aux=True), built.variables["params"], batch
    )
    ledger.loss("loss/per_exit", each)
    ledger.loss("loss/total", np.asarray(total)[None])
    found = weights.export_reference(built.model, {"params": grads})
    largest = max(float(np.linalg.norm(ledger.expected(name))) for name in ledger.names("grad/"))
    for name in ledger.names("grad/"):
        ledger.gradient(name, found[name.removeprefix("grad/")], floor=1e-6 * largest)
