"""The profiler's window: a few steps of a long run, traced into its workdir."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from dyntoken import schema
from dyntoken.schema import Count, Natural

FOLDER = "profile"


@dataclasses.dataclass(frozen=True)
class Window:
    """`config.profile`.

    Attributes:
      start: first step that is traced, from 1; let it be some steps after the
        start of a session, which is not like the others.
      steps: how many.
    """

    start: Count = 20
    steps: Natural = 5

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Window | None:
        """From the section of the config; None if it asks for nothing (no section, or 0 steps).

        Raises:
          UnknownNameError: for another key.
          ValueError: for a value out of range.
        """
        if not given:
            return None
        window = schema.check(cls, given, "config.profile")
        return window if window.steps else None

    def __contains__(self, step: int) -> bool:
        return self.start <= step < self.start + self.steps


class Tracer:
    """Traces the steps of a window with `jax.profiler`, in process 0.

    Open the trace with TensorBoard's profile plugin, or xprof, or the
    `.trace.json.gz` in it with Perfetto.

    Args:
      window: None traces nothing.
      workdir: folder of the run; may be on `gs://`.
      log: takes one line of text.
    """

    def __init__(self, window: Window | None, workdir: epath.Path, log: Callable[[str], None]):
        self._window = window if jax.process_index() == 0 else None
        self._target, self._log = workdir / FOLDER, log
        self._local: tempfile.TemporaryDirectory | None = None
        self._first = 0

    def before(self, step: int, ready: Any) -> None:
        """Starts the trace if a step is the first of the window.

        Args:
          step: about to start.
          ready: results of the one before: only whole steps are traced.
        """
        if self._window is not None and step in self._window and self._local is None:
            jax.block_until_ready(ready)
            # The profiler writes to local disks; what it wrote is copied.
            self._local, self._first = tempfile.TemporaryDirectory(prefix="dyntoken-profile-"), step
            jax.profiler.start_trace(self._local.name)

    def after(self, step: int, ready: Any) -> None:
        """Ends it after the last one.

        Args:
          step: was started.
          ready: its results.
        """
        if self._local is not None and step + 1 not in self._window:
            jax.block_until_ready(ready)
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
