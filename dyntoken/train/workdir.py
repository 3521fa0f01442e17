"""A finished (or running) run, opened from its workdir alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from dyntoken import data, paths
from dyntoken.train import identity
from dyntoken.train import mesh as meshes
from dyntoken.train.checkpoint import CheckpointError, restore_from
from dyntoken.train.plan import Plan, build

Tree = Any


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a workdir holds.

    Attributes:
      plan: of its `config.json`.
      variables: of the newest intact checkpoint, on every device of `plan.mesh`.
      step: of that checkpoint.
    """

    plan: Plan
    variables: Tree
    step: int

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """One pass over the evaluation split, as global arrays split over the mesh."""
        with data.prefetch(self.plan.eval_batches()) as batches:
            for batch in batches:
                yield meshes.place(batch, self.plan.mesh)


def open_workdir(
    workdir: str | epath.PathLike,
    *,
    split: str | None = None,
    ema: bool = False,
    log: Callable[[str], None] = print,
) -> Opened:
    """The plan and the newest weights of a run, without its recipe.

    Args:
      workdir: folder of the run; may be on `gs://`.
      split: what is read instead of the run's evaluation split, `"train[:5000]"`.
      ema: take the weight average.
      log: takes one line of text.

    Raises:
      ValueError: no run there, no intact checkpoint, no such split, or no
        average in the checkpoint.
    """
    workdir = paths.resolve(workdir)
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"no run in {workdir} (it has no config.json): give the workdir of a training run")
    config = json.loads(path.read_text())
    if split is not None:
        config["data"]["eval_split"] = split
    plan = build(config, training=False)
    if ema and plan.settings.ema <= 0:
        raise ValueError(f"the run in {workdir} keeps no weight average: leave --ema out")
    try:
        identity.check(workdir, plan)
        found = restore_from(workdir, plan.abstract_state, log=log)
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    return Opened(plan, found.state.ema if ema else found.state.variables, found.step)
