"""Training time, and the part of it that the devices wait for data."""

from __future__ import annotations

import time
from typing import Any, TypeVar

import jax

from dyntoken import data

T = TypeVar("T")


class Clock:
    """Training time, restarts included and pauses left out.

    Args:
      seconds: time that earlier sessions of this run have trained.
    """

    def __init__(self, seconds: float = 0.0):
        self._before = seconds
        self._running: float | None = None
        self._waited = 0.0
        self._mark = (0, seconds, 0.0)

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self._before + (0.0 if self._running is None else time.monotonic() - self._running)

    def start(self, step: int) -> None:
        """Starts (or goes on) to count; `lap` refers to the steps from here."""
        self._before, self._running = self.seconds, time.monotonic()
        self._mark = (step, self.seconds, self._waited)

    def __enter__(self) -> None:
        """A pause: evaluation and the like do not count as training."""
        self._before, self._running = self.seconds, None

    def __exit__(self, *_: object) -> None:
        self._running = time.monotonic()

    def take(self, batches: data.Prefetch[T], running: Any) -> T:
        """The next batch; counts how long the devices have nothing to do for want of it.

        Args:
          batches: where it comes from.
          running: a result of the step before. While that step is computed
            nobody waits for data.
        """
        if not batches.ready():
            jax.block_until_ready(running)
            began = time.monotonic()
            batch = next(batches)
            self._waited += time.monotonic() - began
            return batch
        return next(batches)

    def lap(self, step: int) -> tuple[float, float]:
        """Steps per second, and the share of time spent waiting in `take`, since the last call (or the start)."""
        then, seconds, waited = self._mark
        self._mark = (step, self.seconds, self._waited)
        passed = max(self._mark[1] - seconds, 1e-9)
        return (step - then) / passed, (self._waited - waited) / passed
