"""Logits of every exit over a whole split: what thresholds are searched on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

Tree = Any
Array = jax.Array
Step = Callable[[Tree, Mapping[str, Array]], dict[str, Array]]


def make_step(model: nn.Module, mesh: Mesh, *, prepare: Callable[[Array], Array], axis: str = "data") -> Step:
    """Compiles `(variables, batch) -> {logits, label, mask}` for a mesh.

    Args:
      model: returns an `Output` with logits `[E, b, K]`.
      mesh: the devices that share the rows of a batch.
      prepare: uint8 images -> normalised float images, both `[b, H, W, C]`.
      axis: name of the mesh's axis.

    The batch holds `image`, `label` int32 `[B]` and `mask` `[B]` (0.0 for
    padding); the logits come back as float32 `[E, B, K]`, rows in order.

    Raises:
      ValueError: a model without exits.
    """
    if not getattr(model, "exits", ()):
        raise ValueError(
            f"{getattr(model, 'arch', type(model).__name__)} has no exits: thresholds need a model with "
            "several, such as dvt_deit_small"
        )

    def step(variables, batch):
        logits = model.apply(variables, prepare(batch["image"]), train=False).logits
        return {"logits": logits.astype(jnp.float32), "label": batch["label"], "mask": batch["mask"]}

    rows = PartitionSpec(axis)
    split = {"logits": PartitionSpec(None, axis), "label": rows, "mask": rows}
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=split)
    return jax.jit(mapped)


def collect(
    step: Step, variables: Tree, batches: Iterable[Mapping[str, Array]]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all exits and labels of a whole split, padding left out.

    Every process gets all rows, in the order of the split. The host holds them
    all: 50,000 images, 1000 classes and three exits are 0.6 GB.

    Args:
      step: from `make_step`.
      variables: of the model.
      batches: device batches, as many on every process.

    Returns:
      logits float32 `[E, N, K]` and labels int32 `[N]`.

    Raises:
      ValueError: no example, or logits that are not finite.
    """
    parts: list[dict[str, np.ndarray]] = []
    waiting = None
    for batch in batches:
        found = step(variables, batch)
        if waiting is not None:  # one batch behind, so that the device never waits
            parts.append(_rows(waiting))
        waiting = found
    if waiting is not None:
        parts.append(_rows(waiting))
    if not sum(len(part["label"]) for part in parts):
        raise ValueError("no example to collect logits of: the split is empty")
    logits = np.concatenate([part["logits"] for part in parts], axis=1)
    if not np.isfinite(logits).all():
        exit_, image = np.argwhere(~np.isfinite(logits).all(axis=-1))[0]
        raise ValueError(
            f"logits are not finite (first at exit {exit_}, image {image}): train the model again"
        )
    return logits, np.concatenate([part["label"] for part in parts])


def _rows(found: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """The real rows of a batch, on the host of every process."""
    whole = {name: _host(value) for name, value in found.items()}
    real = whole["mask"] > 0
    return {"logits": whole["logits"][:, real], "label": whole["label"][real]}


def _host(value: Array) -> np.ndarray:
    if value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))
