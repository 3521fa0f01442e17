"""One pass over the evaluation split of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from dyntoken import data
from dyntoken.train import sharding
from dyntoken.train.build import Run

Tree = Any


def collect(
    run: Run, variables: Tree, read: Callable[[Tree, jax.Array], Sequence[jax.Array]]
) -> tuple[list[np.ndarray], np.ndarray]:
    """What a function says of every image of the evaluation split, and the labels.

    Args:
      read: from variables and normalised images `[b, H, W, C]` to arrays `[b, ...]`.
    """
    rows = PartitionSpec(sharding.AXIS)
    mapped = jax.shard_map(
        lambda variables, images: read(variables, run.prepare(images)),
        mesh=run.mesh,
        in_specs=(PartitionSpec(), rows),
        out_specs=rows,
    )
    step, variables = jax.jit(mapped), sharding.replicate(variables, run.mesh)
    parts, labels = [], []
    with data.prefetch(run.eval_batches()) as batches:
        for batch in batches:
            real = np.asarray(batch["mask"]) > 0
            image = sharding.place({"image": batch["image"]}, run.mesh)["image"]
            parts.append([np.asarray(x, np.float32)[real] for x in step(variables, image)])
            labels.append(np.asarray(batch["label"])[real])
    return [np.concatenate(column) for column in zip(*parts, strict=True)], np.concatenate(labels)
