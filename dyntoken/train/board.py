"""The record of a run for TensorBoard, written by tensorboardX (extra `[tensorboard]`)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

FOLDER = "tensorboard"
# TensorBoard reads files in the order of their names, which hold the second; two of one second differ in this.
_NUMBERS = itertools.count()


class Board:
    """Writes `<workdir>/tensorboard`: the rows of `metrics.jsonl` as `train/...` and `eval/...`.

    Args:
      workdir: folder of the run.

    Raises:
      ImportError: tensorboardX is absent; the message says what to install.
    """

    def __init__(self, workdir: epath.Path):
        try:
            import tensorboardX
        except ImportError as error:
            raise ImportError(
                "config.tensorboard needs tensorboardX: install it with `pip install tensorboardX`, "
                "or set config.tensorboard=False"
            ) from error
        self._make, self._folder = tensorboardX.SummaryWriter, workdir / FOLDER
        self._writer: Any = None

    def resume(self, step: int) -> None:
        """Starts a file that takes back what others say of later steps: those are run again."""
        self.close()
        suffix = f".{os.getpid()}.{next(_NUMBERS):06d}"
        self._writer = self._make(str(self._folder), purge_step=step + 1, filename_suffix=suffix)

    def add(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """One point per value; one per exit where there is a list."""
        for name, value in values.items():
            if isinstance(value, list):
                for exit_, one in enumerate(value):
                    self._writer.add_scalar(f"{kind}/{name}/{exit_}", one, step)
            else:
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        if kind == "eval":
            self._writer.flush()

    def close(self) -> None:
        """Writes what is pending."""
        if self._writer is not None:
            self._writer.close()
