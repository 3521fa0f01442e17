"""Metrics of the training steps, and what is not finite among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dyntoken.train.logging import Value, spell


class NotFiniteError(Exception):
    """A step whose loss or gradient is not finite; its state must not be saved.

    Attributes:
      step: which one.
      told: its metrics.
    """

    def __init__(self, step: int, told: str):
        super().__init__(f"not finite at step {step}: {told}")
        self.step, self.told = step, told


class Watch:
    """Collects metrics one step behind the device and stops at what is not finite.

    Args:
      sums: of a checkpoint between two reports.
    """

    def __init__(self, sums: Mapping[str, Sequence[Any]] | None = None) -> None:
        self._waiting: tuple[int, Mapping[str, Any]] | None = None
        self._sums = {name: (np.asarray(total), count) for name, (total, count) in (sums or {}).items()}

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the next report is of all its steps."""
        sums = {name: [np.asarray(total).tolist(), count] for name, (total, count) in self._sums.items()}
        return {"sums": sums} if sums else {}

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step that may still run; looks at those before.

        Raises:
          NotFiniteError: with the step that it was.
        """
        for value in jax.tree.leaves(metrics):
            value.copy_to_host_async()
        previous, self._waiting = self._waiting, (step, metrics)
        if previous is not None:
            self._look(*previous)

    def flush(self) -> None:
        """Looks at the newest step, too."""
        if self._waiting is not None:
            self._look(*self._waiting)
            self._waiting = None

    def means(self) -> dict[str, Value]:
        """Sum over count of each metric since the last call."""
        self.flush()
        means = {name: _mean(total, count) for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def _look(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {
            name: (np.asarray(total, np.float64), float(count)) for name, (total, count) in metrics.items()
        }
        if not all(np.isfinite(total).all() for total, _ in values.values()):
            told = ", ".join(f"{name} {spell(_mean(*pair), '.6g')}" for name, pair in values.items())
            raise NotFiniteError(step, told)
        for name, (total, count) in values.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + total, before[1] + count)


def _mean(total: np.ndarray, count: float) -> Value:
    return (total / max(count, 1e-30)).tolist()
