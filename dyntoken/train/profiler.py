"""Traces a few steps of a long run with `jax.profiler`."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from dyntoken.train.logging import Observer
from dyntoken.train.settings import ProfileConfig

FOLDER = "profile"


class Profiler(Observer):
    """Writes `<workdir>/profile`, of process 0.

    Open the trace with TensorBoard's profile plugin, or xprof, or the
    `.trace.json.gz` in it with Perfetto.

    Args:
      steps: which are traced.
    """

    def __init__(self, steps: ProfileConfig, workdir: epath.Path, *, total: int, log: Callable[[str], None]):
        self._steps, self._total, self._target, self._log = steps, total, workdir / FOLDER, log
        self._local: tempfile.TemporaryDirectory | None = None
        self._first = 0

    def resume(self, step: int, meta: Mapping[str, Any]) -> None:
        self.close()

    def start(self, step: int) -> None:
        if self._local is None and step + 1 in self._steps:
            # The profiler writes to local disks; what it wrote is copied.
            self._local, self._first = tempfile.TemporaryDirectory(prefix="dyntoken-profile-"), step + 1
            jax.profiler.start_trace(self._local.name)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        if (self._local is None) == (step < self._total and step + 1 in self._steps):
            jax.block_until_ready(metrics)  # only whole steps are traced
            if self._local is None:
                self.start(step)
            else:
                self._finish(step)

    def _finish(self, step: int) -> None:
        local, self._local = self._local, None
        with local:
            jax.profiler.stop_trace()
            for file in pathlib.Path(local.name).rglob("*"):
                if file.is_file():
                    target = self._target / file.relative_to(local.name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
        self._log(f"traced steps {self._first} to {step} into {self._target}")

    def close(self) -> None:
        """Ends a trace that is still running, and leaves it out."""
        local, self._local = self._local, None
        if local is not None:
            with local:
                jax.profiler.stop_trace()
