"""What a run says: one JSON object per line in a file, one line on the console."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from dyntoken.analysis import learning, plot
from dyntoken.train.board import Board
from dyntoken.train.clock import Clock
from dyntoken.weights import workdirs

Log = Callable[[str], None]
Value = float | list[float]  # a list has one entry per exit


class Report:
    """Writes `<workdir>/metrics.jsonl` (process 0 only) and console lines.

    Args:
      workdir: folder of the run.
      total: number of steps of the run.
      batch: rows of the global batch.
      board: also writes for TensorBoard.
      curves: also draws `<workdir>/curves.png` at every evaluation; without
        matplotlib it says so once.
      log: takes one line of text.

    Raises:
      ImportError: a board without tensorboardX.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        total: int,
        batch: int,
        board: bool = False,
        curves: bool = False,
        log: Log = print,
    ):
        self._path, self._picture = workdir / workdirs.METRICS, workdir / "curves.png"
        self._total, self._batch, self._log = total, batch, log
        self._writes = jax.process_index() == 0
        self._board = Board(workdir) if board and self._writes else None
        self._draws = curves and self._writes

    def resume(self, step: int) -> None:
        """Forgets what a killed session wrote after `step`: those steps are run again."""
        if self._board is not None:
            self._board.resume(step)
        if not self._writes or not self._path.exists():
            return
        rows = [row for row in self.rows() if row["step"] <= step]
        atomic_write(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def rows(self) -> list[dict[str, Any]]:
        """All that was written; a half-written last line is left out."""
        return workdirs.read_rows(self._path)

    def close(self) -> None:
        """Writes what is pending."""
        if self._board is not None:
            self._board.close()

    def train(self, step: int, metrics: Mapping[str, Value], *, lr: float, clock: Clock) -> None:
        """Reports the means since the last report; `data` is the share of time without a batch."""
        speed, wait = clock.lap(step)
        rate = speed * self._batch
        facts = {"lr": lr, "images_per_s": rate, "data_wait": wait, "seconds": clock.seconds}
        self._write(step, "train", {**metrics, **facts})
        left = (self._total - step) / speed
        losses = "  ".join(f"{name} {spell(value, '.4g')}" for name, value in metrics.items())
        self._log(
            f"step {step}/{self._total}  {100 * step / self._total:.1f}%  {rate:.4g} img/s  "
            f"data {100 * wait:.0f}%  ETA {duration(left)}  lr {lr:.3g}  {losses}"
        )

    def evaluation(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Reports an evaluation; keys may carry the prefix `ema/`."""
        self._write(step, "eval", metrics)
        values = "  ".join(
            f"{name} {spell(value, '.2f', 100)}%" if "top" in name else f"{name} {spell(value, '.6g')}"
            for name, value in metrics.items()
        )
        self._log(f"eval at step {step}/{self._total}  {values}")
        if self._draws:
            self._draw()

    def _draw(self) -> None:
        try:
            figure = learning.learning_curves(self.rows(), title=self._path.parent.name)
        except ModuleNotFoundError as error:
            self._draws = False
            self._log(f"no {self._picture.name}: {error}")
            return
        plot.save(figure, self._picture)

    def evaluated(self, step: int) -> dict[str, Value] | None:
        """The latest evaluation that was reported at a step, if any."""
        for row in reversed(self.rows()):
            if row["step"] == step and row["kind"] == "eval":
                return {name: value for name, value in row.items() if name not in ("step", "kind")}
        return None

    def _write(self, step: int, kind: str, values: Mapping[str, Value]) -> None:
        if self._writes:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
            if self._board is not None:
                self._board.add(step, kind, values)


def spell(value: Value, form: str, scale: float = 1) -> str:
    """A number, or one per exit as `1.25/0.98/0.87`."""
    return "/".join(f"{scale * one:{form}}" for one in (value if isinstance(value, list) else [value]))


def atomic_write(path: epath.Path, text: str) -> None:
    """Replaces a file as a whole: a reader sees the old text or the new one."""
    draft = path.parent / (path.name + ".new")
    draft.write_text(text)
    draft.replace(path)


def duration(seconds: float) -> str:
    """`3h12m`, `4m05s` or `7s`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"


def silent(line: str) -> None:
    """The log of those who say nothing: all processes but the first."""
