"""PS-ViT: kind `psvit`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.backbones import psvit
from dyntoken.ops import bilinear
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """The sampling operator and its gradients, every iteration, every block, logits."""
    _check_operator(case, ledger)
    built = common.build(case, case.info["constructor"])
    images = common.nhwc(ledger.expected("x"))
    out, seen = common.captured(built, images, (psvit.Stem, psvit.Sampling))
    features = seen["stem"]["__call__"][0]
    ledger.offer("stem", features.transpose(0, 3, 1, 2))
    _check_iterations(ledger, built.model.plain(), seen, features)
    rows = out.tokens.prefix + _order(built.model.plain().grid)
    index = np.concatenate([np.arange(out.tokens.prefix), rows])
    for number, block in enumerate(out.records["blocks"]):
        ledger.offer(f"trans{number}", block[:, index])
    ledger.offer("logits", out.logits)


def _order(grid: tuple[int, int]) -> np.ndarray:
    """Our row of each of the reference's points: it counts them column by column."""
    return np.arange(grid[0] * grid[1]).reshape(grid).T.reshape(-1)


def _check_iterations(ledger: Ledger, body: Any, seen: Any, features: np.ndarray) -> None:
    order, offset = _order(body.grid), 0.0
    before = np.asarray(psvit.start_points(body.grid, features.shape[1:3]))[None]
    for step in range(body.iterations):
        points = seen["points"][step]
        sampled = common.run(
            bilinear.sample, features, np.broadcast_to(before + body.gamma * offset, points.shape)
        )
        rows, moved = seen[f"sampling_{step}"]["__call__"][0]
        ledger.offer(f"ps{step}/sampled", sampled[:, order])
        ledger.offer(f"ps{step}/point", points[:, order])
        ledger.offer(f"ps{step}/feat", rows[:, order])
        if moved is not None:
            ledger.offer(f"ps{step}/offset", moved[:, order])
        before, offset = points, moved


def _check_operator(case: Case, ledger: Ledger) -> None:
    """One call on points inside, on the rim and outside, and the reference kernel's gradients."""
    if not ledger.holds("op/feature"):
        return
    features = common.nhwc(ledger.expected("op/feature"))
    point, offset, grad = (ledger.expected(f"op/{name}") for name in ("point", "offset", "grad_out"))
    gamma = float(case.info["op_gamma"])

    def forward(features: Any, offset: Any) -> Any:
        return bilinear.sample(features, jnp.asarray(point) + gamma * offset)

    def both(features: Any, offset: Any, grad: Any) -> Any:
        out, back = jax.vjp(forward, features, offset)
        return out, *back(grad)

    out, grad_features, grad_offset = common.run(both, features, offset, grad)
    ledger.offer("op/out", out)
    ledger.gradient("op/grad_feature", grad_features.transpose(0, 3, 1, 2))
    ledger.gradient("op/grad_offset", grad_offset)
