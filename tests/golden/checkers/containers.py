"""Weight files as repositories publish them: kind `pth_containers`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken import weights
from tests.golden.case import Case
from tests.golden.checkers import common
from tests.golden.ledger import Ledger

STORES = {"params": "weights.safetensors", "ema": "weights_ema.safetensors"}
NARROW = {"float16": np.float16, "bfloat16": jnp.bfloat16}


def check(case: Case, ledger: Ledger) -> None:
    """Every container, whichever set is preferred, and the logits of both sets."""
    images = ledger.expected("input.images").transpose(0, 2, 3, 1)
    built = {name: common.build(case, case.info["constructor"], file=file) for name, file in STORES.items()}
    for name, one in built.items():
        ledger.close(
            "eval.logits" if name == "params" else "ema.eval.logits",
            one.model.apply(one.variables, images).logits,
        )
    for file, about in case.info["containers"].items():
        for prefer in STORES:
            wanted = built["ema" if about[f"with_prefer_{prefer}"].startswith("ema") else "params"]
            found = weights.load_weights(wanted.model, case.folder / file, prefer=prefer, return_report=True)[
                0
            ]
            kind = NARROW.get(about["stored_dtype"], np.float32)
            off = jax.tree.map(
                lambda a, b, kind=kind: not np.array_equal(a, np.asarray(b).astype(kind).astype(np.float32)),
                found,
                wanted.variables,
            )
            if any(jax.tree.leaves(off)):
                ledger.fail(f"{file}, prefer={prefer}: other values")
