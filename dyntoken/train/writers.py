"""Where the rows of `metrics.jsonl` go besides: TensorBoard and Weights & Biases (process 0 only)."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from dyntoken.train.logging import MetricBuffer, Observer, Value

# TensorBoard reads files in the order of their names, which hold the second; two of one second differ in this.
_NUMBERS = itertools.count()


class Points(Observer):
    """Turns reports and evaluations into points: `train/loss`, `eval/top1`, `eval/top1_per_exit/0`, ...

    A writer for another service implements `add`, and what else of an `Observer` it needs.
    """

    def __init__(self, metrics: MetricBuffer):
        self._metrics = metrics

    def add(self, step: int, points: Mapping[str, float]) -> None:
        """Writes the points of a step."""
        raise NotImplementedError

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One point per value of the row, if there is one."""
        if (row := self._metrics.row) is not None:
            self.add(step, _points("train", row))

    def eval(self, step: int, metrics: Mapping[str, Value]) -> None:
        self.add(step, _points("eval", metrics))


def _points(kind: str, values: Mapping[str, Value]) -> dict[str, float]:
    points: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            points |= {f"{kind}/{name}/{exit_}": one for exit_, one in enumerate(value)}
        else:
            points[f"{kind}/{name}"] = value
    return points


class TensorBoard(Points):
    """Writes `<workdir>/tensorboard` by tensorboardX.

    Raises:
      ImportError: tensorboardX is absent; the message says what to install.
    """

    def __init__(self, workdir: epath.Path, metrics: MetricBuffer):
        super().__init__(metrics)
        try:
            import tensorboardX
        except ImportError as error:
            raise ImportError(
                "config.tensorboard needs tensorboardX: install it with `pip install tensorboardX`, "
                "or set config.tensorboard=False"
            ) from error
        self._make, self._folder = tensorboardX.SummaryWriter, workdir / "tensorboard"
        self._writer: Any = None

    def resume(self, step: int, meta: Mapping[str, Any]) -> None:
        """Starts a file that takes back what others say of later steps."""
        self.close()
        suffix = f".{os.getpid()}.{next(_NUMBERS):06d}"
        self._writer = self._make(str(self._folder), purge_step=step + 1, filename_suffix=suffix)

    def add(self, step: int, points: Mapping[str, float]) -> None:
        for name, value in points.items():
            self._writer.add_scalar(name, value, step)

    def eval(self, step: int, metrics: Mapping[str, Value]) -> None:
        super().eval(step, metrics)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Points):
    """Writes a run of Weights & Biases, its files under `<workdir>/wandb`; the same run when the training goes on.

    `WANDB_MODE=offline` needs neither a network nor an account. The service takes no step that is
    not above the last one, but after a rewind steps come again: the step is a value of each point (`step`).

    Args:
      project: its name.
      config: of the run, shown there.

    Raises:
      ImportError: wandb is absent; the message says what to install.
      ValueError: a workdir on remote storage.
    """

    def __init__(
        self, workdir: epath.Path, metrics: MetricBuffer, *, project: str, config: Mapping[str, Any]
    ):
        super().__init__(metrics)
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "config.wandb needs wandb: install it with `pip install wandb`, or set config.wandb=''"
            ) from error
        if "://" in os.fspath(workdir):
            raise ValueError(
                f"config.wandb writes beside the run, which {workdir} does not allow: set it to ''"
            )
        known = hashlib.sha1(os.path.abspath(workdir).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=project,
            name=workdir.name,
            id=known,
            resume="allow",
            dir=os.fspath(workdir),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, points: Mapping[str, float]) -> None:
        self._run.log({**points, "step": step})

    def close(self) -> None:
        self._run.finish()
