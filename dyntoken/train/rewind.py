"""Going back to a checkpoint from a loss that is not finite, and on with other images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dyntoken.train.state import TrainError
from dyntoken.train.watch import NotFiniteError

REMEDY = "Lower optim.lr, set optim.clip or lengthen the warm-up, then run again"


class Rewinds:
    """The rewinds of a run, part of each checkpoint from there on.

    After a rewind the batches up to the bad one are left out, and the draws
    that are keyed by the position of a row are others: a function of the seed
    and of the rewinds alone. A run that is killed after one, and before the
    next checkpoint, meets the bad step again and goes the same way.

    Args:
      allowed: how many there may be in the whole run.
      done: (step gone back to, bad step) of each so far.
    """

    def __init__(self, allowed: int, done: Iterable[Sequence[int]] = ()):
        self._allowed = allowed
        self.done = [[int(back), int(bad)] for back, bad in done]

    @property
    def data(self) -> dict[str, int]:
        """Arguments of `Run.train_batches`."""
        return {"skipped": sum(bad - back for back, bad in self.done), "rewinds": len(self.done)}

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rewinds": self.done} if self.done else {}

    def check(self, bad: NotFiniteError, saved: int | None) -> None:
        """Raises `TrainError` if the run may not go back (again); `saved` is the step of the last checkpoint."""
        if len(self.done) < self._allowed:
            return
        spent = f"; it went back {len(self.done)} times already (config.rewind)" if self.done else ""
        last = "nothing was saved" if saved is None else f"nothing after step {saved} was saved"
        raise TrainError(f"{bad}; {last}{spent}. {REMEDY}") from bad

    def add(self, back: int, bad: NotFiniteError) -> str:
        """Notes a rewind; returns what to say about it."""
        self.done.append([back, bad.step])
        return (
            f"{bad}; going back to step {back}, rewind {len(self.done)} of {self._allowed}: the next images "
            f"are those after step {bad.step}"
        )
