"""What a run says: one JSON object per line in a file, one line on the console."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

Log = Callable[[str], None]
Value = float | list[float]  # a list has one entry per exit


class Clock:
    """Training time, restarts included and pauses left out.

    Args:
      seconds: time that earlier sessions of this run have trained.
    """

    def __init__(self, seconds: float = 0.0):
        self._before = seconds
        self._running: float | None = None
        self._mark = (0, seconds)

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self._before + (0.0 if self._running is None else time.monotonic() - self._running)

    def start(self, step: int) -> None:
        """Starts to count; `speed` refers to the steps from here."""
        self._running = time.monotonic()
        self._mark = (step, self.seconds)

    def __enter__(self) -> None:
        """A pause: evaluation and the like do not count as training."""
        self._before, self._running = self.seconds, None

    def __exit__(self, *_: object) -> None:
        self._running = time.monotonic()

    def speed(self, step: int) -> float:
        """Steps per second since the last call (or the start)."""
        then, seconds = self._mark
        self._mark = (step, self.seconds)
        return (step - then) / max(self._mark[1] - seconds, 1e-9)


class Report:
    """Writes `<workdir>/metrics.jsonl` (process 0 only) and console lines.

    Args:
      workdir: folder of the run.
      total: number of steps of the run.
      batch: rows of the global batch.
      log: takes one line of text.
    """

    def __init__(self, workdir: epath.Path, *, total: int, batch: int, log: Log = print):
        self._path = workdir / "metrics.jsonl"
        self._total, self._batch, self._log = total, batch, log
        self._writes = jax.process_index() == 0

    def resume(self, step: int) -> None:
        """Forgets what a killed session wrote after `step`: those steps are run again."""
        if not self._writes or not self._path.exists():
            return
        rows = [row for row in self.rows() if row["step"] <= step]
        atomic_write(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def rows(self) -> list[dict[str, Any]]:
        """All that was written; a half-written last line is left out."""
        if not self._path.exists():
            return []
        return [row for row in map(_parse, self._path.read_text().splitlines()) if row is not None]

    def train(self, step: int, metrics: Mapping[str, Value], *, lr: float, clock: Clock) -> None:
        """Reports the means since the last report."""
        speed = clock.speed(step)
        rate = speed * self._batch
        self._write(step, "train", {**metrics, "lr": lr, "images_per_s": rate, "seconds": clock.seconds})
        left = (self._total - step) / speed
        losses = "  ".join(f"{name} {spell(value, '.4g')}" for name, value in metrics.items())
        self._log(
            f"step {step}/{self._total}  {100 * step / self._total:.1f}%  {rate:.4g} img/s  "
            f"ETA {duration(left)}  lr {lr:.3g}  {losses}"
        )

    def evaluation(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Reports an evaluation; keys may carry the prefix `ema/`."""
        self._write(step, "eval", metrics)
        values = "  ".join(
            f"{name} {spell(value, '.2f', 100)}%" if "top" in name else f"{name} {spell(value, '.6g')}"
            for name, value in metrics.items()
        )
        self._log(f"eval at step {step}/{self._total}  {values}")

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


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row and "kind" in row else None
