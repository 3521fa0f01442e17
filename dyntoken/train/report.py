"""What a run says: one JSON object per line in a file, one line on the console."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from etils import epath

from dyntoken import paths
from dyntoken.analysis import figures, learning_curves
from dyntoken.train.board import Board
from dyntoken.train.clock import Clock
from dyntoken.weights import workdirs

Log = Callable[[str], None]
Value = float | list[float]  # a list has one entry per exit
FLUSH_S = 30.0


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
        self._pending: list[str] = []
        self._flushed = time.monotonic()

    def resume(self, step: int) -> None:
        """Forgets what a killed session wrote after `step`: those steps are run again."""
        if self._board is not None:
            self._board.resume(step)
        self.flush()
        if not self._writes or not self._path.exists():
            return
        self._rewrite([row for row in workdirs.read_rows(self._path, self._log) if row["step"] <= step])

    def rows(self) -> list[dict[str, Any]]:
        """All that was written; a half-written last line is left out."""
        self.flush()
        return workdirs.read_rows(self._path)

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        atomic_write(self._path, "".join(map(_line, rows)))

    def close(self) -> None:
        """Writes what is pending."""
        self.flush()
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
        """Reports an evaluation, in the place of an earlier one at this step; keys may carry the prefix `ema/`."""
        if self._writes and self.evaluated(step) is not None:
            self._rewrite(row for row in self.rows() if (row["step"], row["kind"]) != (step, "eval"))
        self._write(step, "eval", metrics)
        self.flush()
        values = "  ".join(
            f"{name} {spell(value, '.2f', 100)}%" if "top" in name else f"{name} {spell(value, '.6g')}"
            for name, value in metrics.items()
        )
        self._log(f"eval at step {step}/{self._total}  {values}")
        if self._draws:
            self._draw()

    def _draw(self) -> None:
        try:
            figure = learning_curves.learning_curves(self.rows(), title=self._path.parent.name)
        except ModuleNotFoundError as error:
            self._draws = False
            self._log(f"no {self._picture.name}: {error}")
            return
        figures.save(figure, self._picture)

    def evaluated(self, step: int) -> dict[str, Value] | None:
        """The latest evaluation that was reported at a step, if any."""
        for row in reversed(self.rows()):
            if row["step"] == step and row["kind"] == "eval":
                return {name: value for name, value in row.items() if name not in ("step", "kind")}
        return None

    def _write(self, step: int, kind: str, values: Mapping[str, Value]) -> None:
        if self._writes:
            self._pending.append(_line({"step": step, "kind": kind, **values}))
            # Nothing can be appended to an object of a storage service: it is written anew, so not at every row.
            if not paths.is_uri(self._path) or time.monotonic() > self._flushed + FLUSH_S:
                self.flush()
            if self._board is not None:
                self._board.add(step, kind, values)

    def flush(self) -> None:
        """Writes the rows that are pending: those of a checkpoint must be there before it is."""
        if not self._pending:
            return
        text = "".join(self._pending)
        if paths.is_uri(self._path):
            before = self._path.read_text() if self._path.exists() else ""
            atomic_write(self._path, before + text)
        else:
            with self._path.open("a") as file:
                file.write(text)
        self._pending, self._flushed = [], time.monotonic()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({name: finite(value) for name, value in row.items()}) + "\n"


def finite(value: Any) -> Any:
    """A number (or numbers) as JSON can hold it: None for what is not finite."""
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def spell(value: Value, form: str, scale: float = 1) -> str:
    """A number, or one per exit as `1.25/0.98/0.87`."""
    return "/".join(f"{scale * one:{form}}" for one in (value if isinstance(value, list) else [value]))


def atomic_write(path: epath.Path, text: str) -> None:
    """Replaces a file as a whole: a reader sees the old text or the new one."""
    if paths.is_uri(path):  # as every write to a storage service
        path.write_text(text)
        return
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
