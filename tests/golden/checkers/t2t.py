"""T2T-ViT: kind `t2t_vit`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from dyntoken.backbones import t2t
from dyntoken.ops import unfold
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """The soft split, the two T2T steps, every block, norm and logits."""
    built = common.build(case, case.info["constructor"])
    images = common.nhwc(ledger.expected("x"))
    _check_split(ledger, images)

    def forward(variables, images):
        return built.model.apply(
            variables,
            images,
            record=common.RECORD,
            capture_intermediates=lambda module, _: isinstance(module, tuple(t2t.STEPS.values())),
            mutable=["intermediates"],
        )

    out, state = common.run(forward, built.variables, images)
    steps = state["intermediates"]["backbone"]["tokens_to_token"]
    for name in ("attention1", "attention2"):
        ledger.offer(f"t2t/{name}", steps[name]["__call__"][0])
    positions = built.variables["params"]["backbone"]["pos_embed"]
    ledger.offer("tokens", out.records["embed"][:, 1:] - np.asarray(positions)[:, 1:])
    for index, block in enumerate(out.records["blocks"]):
        ledger.offer(f"block{index}", block)
    ledger.offer("norm", out.tokens.x)
    ledger.offer("logits", out.logits)


def _check_split(ledger: Ledger, images: np.ndarray) -> None:
    kernel, stride, padding = t2t.first_split(images.shape[1], -(-images.shape[1] // 16))
    rows = unfold.unfold(jnp.asarray(images[:1]), (kernel,) * 2, (stride,) * 2, (padding,) * 2)
    rows = np.asarray(rows)[0]
    ledger.offer("unfold0_sample0", rows.reshape(-1, rows.shape[-1]).T)
