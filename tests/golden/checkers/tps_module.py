"""The squeezing operator alone: kind `tps_module`."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.ops import fuse
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Outputs, hosts and gradients of every recorded setting; ties are optional."""
    for name in case.named("output"):
        if name.startswith("tie."):
            ledger.skip(
                name, "optional: the reference counts a tied row in every host, one argmax in the first"
            )
        elif name.endswith(".out"):
            stem = name.removesuffix("out")
            options = _options(case, name)
            (_check_train if name.startswith("train.") else _check_eval)(ledger, stem, options)


def _options(case: Case, name: str) -> dict[str, Any]:
    """Temperature and similarity, from the description of the array."""
    what = case.info["arrays"][name]["what"]
    found = re.search(r"temperature\s*=?\s*([0-9.]+)", what)
    if not found:
        raise ValueError(f"{name}: no temperature in its description {what!r}")
    measure = "dot" if "l2_norm=False" in what else "cosine"
    return {"temperature": float(found.group(1).rstrip(".")), "measure": measure}


def _check_eval(ledger: Ledger, stem: str, options: dict[str, Any]) -> None:
    x, y, cotangent = (ledger.expected(name) for name in ("x", "y", "cotangent"))

    def total(x, y):
        fused = fuse.squeeze(x, y, **options)
        return jnp.sum(fused.x * cotangent), fused

    (_, fused), (dx, dy) = common.run(jax.value_and_grad(total, argnums=(0, 1), has_aux=True), x, y)
    ledger.close(stem + "out", fused.x)
    ledger.equal(stem + "host_idx", fused.host)
    ledger.gradient(stem + "grad_x", dx)
    ledger.gradient(stem + "grad_y", dy)


def _check_train(ledger: Ledger, stem: str, options: dict[str, Any]) -> None:
    names = ("train.x", "train.prev_decision", "train.keep_decision", "train.cotangent")
    x, previous, keep, cotangent = (ledger.expected(name) for name in names)

    def total(x, keep):
        weight = (1.0 - keep) * previous
        fused = fuse.squeeze(x, x, allowed=keep, weight=weight, same=True, **options)
        return jnp.sum(fused.x * cotangent), fused

    (_, fused), (dx, dkeep) = common.run(jax.value_and_grad(total, argnums=(0, 1), has_aux=True), x, keep)
    ledger.close(stem + "out", fused.x)
    ledger.equal(stem + "host_idx", np.where((keep < 0.5) & (previous > 0.5), fused.host, -1))
    ledger.gradient(stem + "grad_x", dx)
    ledger.gradient(stem + "grad_keep_decision", dkeep)
