"""Orbax checkpoints as weight sources; apart from `files`, so that Orbax is imported on use."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dyntoken import checkpoints, paths, workdirs
from dyntoken.weights import runs
from dyntoken.weights.errors import WeightsError, first_line


def read(path: Any, step: int | str = "newest") -> dict[str, Any]:
    """Trees of one checkpoint in a workdir (`<workdir>/checkpoints`).

    Args:
      path: the workdir, its `checkpoints` directory, or one step directory.
      step: "newest", "best" (by the run's `best_metric`) or a step.

    Returns:
      Nested dict with "params" and, where the checkpoint has them, "ema" and
      "batch_stats".

    Raises:
      WeightsError: no finished checkpoint, or an unreadable one.
    """
    try:
        directory = workdirs.step_folder(paths.resolve(path), step)
    except workdirs.CheckpointError as error:
        raise WeightsError(str(error)) from error
    item = directory / "state" if (directory / "state").exists() else directory
    checkpoints.ignore_late_callbacks()
    handler = ocp.StandardCheckpointHandler()
    try:
        metadata = handler.metadata(item)
        target = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype), getattr(metadata, "tree", metadata)
        )
        state = handler.restore(item, args=ocp.args.StandardRestore(target))
        unverified = _verify(directory, state)
    except WeightsError:
        raise
    except Exception as error:  # orbax raises whatever the storage layer raised
        reason = checkpoints.unreadable(directory, error)
        if reason is not None:
            raise WeightsError(f"{directory} cannot be read ({reason}): see to the storage") from error
        raise _damaged(directory, first_line(error)) from error
    finally:
        handler.close()
    if unverified:
        warnings.warn(unverified, stacklevel=2)
    trees = {key: state[key] for key in ("params", "ema", "batch_stats") if state.get(key)}
    if "batch_stats" not in trees and state.get("extra"):
        trees["batch_stats"] = state["extra"].get("batch_stats", {})
    return trees if "params" in trees else {"params": state}


def describe(path: Any, step: int | str = "newest") -> dict[str, str]:
    """What the same checkpoint says of its run, see `runs.strings`; arguments as `read`."""
    return runs.strings(runs.of_workdir(path, step))


def _verify(directory: epath.Path, state: Mapping[str, Any]) -> str | None:
    """Compares each array with the checksum that the trainer wrote (orbax itself keeps none); says what has none."""
    if not (directory / "state").exists():
        return None  # not from a trainer of ours
    path = directory / workdirs.META
    meta = json.loads(path.read_text()) if path.exists() else {}
    written = meta.get("leaves") or {}
    arrays = checkpoints.flatten(dict(state))
    for name, value in arrays.items():
        if name in written and checkpoints.describe_leaf(np.asarray(value))[2] != written[name][2]:
            raise _damaged(directory, f"{name} has another checksum than when it was written")
    without = sum(name not in written for name in arrays)
    if not without:
        return None
    many = "nothing" if without == len(arrays) else f"{len(arrays) - without} of {len(arrays)} arrays"
    return f"{path} is missing or without checksums: {many} verified"


def _damaged(directory: epath.Path, why: str) -> WeightsError:
    """The error for a checkpoint that is not what was written."""
    name = directory.name
    older = [n for n in workdirs.numbered(directory.parent) if name.isdigit() and n < int(name)]
    remedy = f"give step={max(older)}, the one before" if older else "there is none before it"
    return WeightsError(f"{directory}: damaged checkpoint ({why}); {remedy}")
