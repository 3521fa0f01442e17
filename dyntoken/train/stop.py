"""SIGTERM and Ctrl-C as a question the loop asks between steps."""

from __future__ import annotations

import contextlib
import os
import signal

import jax

from dyntoken import interrupt


class Stop:
    """Turns SIGTERM and SIGINT into `asked`, while it is entered; a second one ends the process.

    Several processes are asked through the cluster's notice instead
    (`Checkpoints.preempted`), so that all of them stop at the same step.

    Attributes:
      signum: of the signal that came; 0 for none.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._several = jax.process_count() > 1
        self._stack = contextlib.ExitStack()

    @property
    def asked(self) -> bool:
        """Whether this process alone decides to stop."""
        return self.signum != 0 and not self._several

    def __enter__(self) -> Stop:
        if not self.signum:
            self._stack.enter_context(interrupt.listening(self._ask))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _ask(self, signum: int) -> None:
        self.signum = signum
        if self._several and signum != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)  # jax waits for it, and gives notice to the others
