"""What the checkers of methods that merge share: their models, and addresses with the prefix rows."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from dyntoken import create_model, weights
from dyntoken.nn.attention import Attention
from tests.golden.case import Case
from tests.golden.checkers import common

# Constructor argument -> our field; what else a case has is a method's own.
FIELDS = {"embed_dim": "width", "num_heads": "heads", "input_size": "img_size"}
FIELDS |= {
    n: n for n in ("img_size", "patch_size", "depth", "mlp_ratio", "qkv_bias", "num_classes", "in_chans")
}


def build(case: Case, method: str, *, file: str = "weights.safetensors", **options: Any) -> common.Built:
    """`method` on DeiT with the weights of a case: every key used, none missing.

    Args:
      options: of the method, and `at`, `keep`, `form`.
    """
    given = {FIELDS[name]: value for name, value in case.info["constructor"].items() if name in FIELDS}
    distilled = case.kind.endswith("_distilled")
    fields = {**given, "norm_eps": 1e-6, "distilled": distilled}
    model = create_model(f"{method}_vit_small_patch16_224", **fields, **options)
    dense = common.build(
        case, constructor(case), repository="timm", cls=f"VisionTransformer{'Distilled' * distilled}"
    )
    images = jax.ShapeDtypeStruct((1, *model.input_shape), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    if jax.tree.structure(shapes) != jax.tree.structure(dense.variables):
        raise ValueError(f"{method} has other parameters than the dense model")
    return common.Built(model, dense.variables, weights.reference_keys(model))


def constructor(case: Case) -> dict[str, Any]:
    """The arguments of timm's class."""
    given = dict(case.info["constructor"])
    if "input_size" in given:
        given["img_size"] = given.pop("input_size")
    names = {"embed_dim", "num_heads", *(name for name in FIELDS if name != "input_size")}
    return {name: value for name, value in given.items() if name in names}


def evaluate(built: common.Built, images: np.ndarray) -> tuple[Any, list[Any]]:
    """`(Output with everything recorded, per block what its attention showed)`."""
    out, state = common.captured(built, images, (Attention,))
    seen = [state["trunk"][f"blocks_{i}"]["attn"]["__call__"][0][1] for i in range(built.model.plain().depth)]
    return out, seen


def source(carrier: np.ndarray, rows: int, prefix: int) -> np.ndarray:
    """`[B, prefix + rows, prefix + N0]` 0/1: which first rows went into each row."""
    hit = carrier[:, None, :] == np.arange(rows)[None, :, None]
    out = np.zeros((len(carrier), prefix + rows, prefix + carrier.shape[1]), np.int32)
    out[:, prefix:, prefix:] = hit
    out[:, range(prefix), range(prefix)] = 1
    return out


def with_prefix(values: np.ndarray, prefix: int, first: Any) -> np.ndarray:
    """`[B, n]` values of patches after those of the prefix rows."""
    return np.concatenate([np.broadcast_to(np.asarray(first), (len(values), prefix)), values], axis=1)


def destinations(reduction: Any, prefix: int) -> np.ndarray:
    """`[B, prefix + n]`: for each row that enters a site the row it is in afterwards, prefix rows counted."""
    return with_prefix(reduction.remap + prefix, prefix, np.arange(prefix))
