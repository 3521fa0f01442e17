"""SIGTERM as a question the loop asks between steps."""

from __future__ import annotations

import signal
import threading
from typing import Any

import jax


class Stop:
    """Turns SIGTERM into `asked`, while it is entered.

    Several processes are asked through the cluster's notice instead
    (`Checkpoints.preempted`), so that all of them stop at the same step.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._active = threading.current_thread() is threading.main_thread() and jax.process_count() == 1

    def __enter__(self) -> Stop:
        if self._active:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
