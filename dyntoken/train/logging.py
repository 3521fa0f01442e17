"""What watches a run: the guard of finite metrics, the record, a live line, and which checkpoints stay."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath

from dyntoken import data, multihost, paths, progress, workdirs
from dyntoken.analysis import figures, learning_curves
from dyntoken.train.state import TrainError

T = TypeVar("T")
Log = Callable[[str], None]
Value = float | list[float]  # a list has one entry per exit
FLUSH_S = 30.0
SIDE = ("lr", "images_per_s", "data_wait", "seconds", "grad_norm", "update_norm")  # of a row: no losses


class NotFiniteError(TrainError):
    """A step whose loss or gradient is not finite; its state must not be saved.

    Attributes:
      step: which one.
    """

    def __init__(self, step: int, told: str):
        super().__init__(f"not finite at step {step}: {told}")
        self.step = step


class Observer:
    """Hears of a run; what it does not care about does nothing.

    Attributes:
      meta: JSON values that a checkpoint keeps for it.
    """

    meta: Mapping[str, Any] = {}

    def resume(self, step: int, meta: Mapping[str, Any]) -> None:
        """The run is at a step, with `meta` of its checkpoint: what is known of later steps is void."""

    def start(self, step: int) -> None:
        """The step after this one is about to run, the first after a start or a compilation."""

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A step was started; its metrics, pairs (sum, count) on the devices, may not be there yet."""

    def eval(self, step: int, metrics: Mapping[str, Value]) -> None:
        """The state after a step was evaluated."""

    def close(self) -> None:
        """The session ends, well or not."""


class Clock:
    """Training time, restarts included and pauses left out, and the part of it that devices wait for data."""

    def __init__(self) -> None:
        self._before = 0.0
        self._running: float | None = None
        self._waited = 0.0
        self._mark = (0, 0.0, 0.0)

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self._before + (0.0 if self._running is None else time.monotonic() - self._running)

    def add(self, seconds: float) -> None:
        """Counts what earlier sessions have trained."""
        self._before += seconds

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
        if batches.ready():
            return next(batches)
        jax.block_until_ready(running)
        began = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - began
        return batch

    def lap(self, step: int) -> tuple[float, float]:
        """Steps per second, and the share of time spent waiting in `take`, since the last call (or the start)."""
        then, seconds, waited = self._mark
        self._mark = (step, self.seconds, self._waited)
        passed = max(self._mark[1] - seconds, 1e-9)
        return (step - then) / passed, (self._waited - waited) / passed


class MetricBuffer(Observer):
    """Sums the metrics of the steps between two reports, one step behind the device; guards against NaN.

    Args:
      clock: of the run.
      every: steps between two reports.
      lr_fn: the learning rate of a step.

    Attributes:
      row: what is to be reported of the steps up to the newest one; None while there is nothing.
    """

    def __init__(
        self, clock: Clock, *, every: int, total: int, batch: int, lr_fn: Callable[[int], Any]
    ) -> None:
        self._clock, self._every, self._total, self._lr_fn = clock, every, total, lr_fn
        self.batch = batch
        self.row: dict[str, Value] | None = None
        self.resume(0, {})

    def resume(self, step: int, meta: Mapping[str, Any]) -> None:
        """Takes up the sums of a checkpoint between two reports."""
        self._waiting: tuple[int, Mapping[str, Any]] | None = None
        self._sums = {name: (np.asarray(total), n) for name, (total, n) in meta.get("sums", {}).items()}

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the next report is of all its steps."""
        sums = {name: [np.asarray(total).tolist(), count] for name, (total, count) in self._sums.items()}
        return {"sums": sums} if sums else {}

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Looks at the metrics of the step before; of all where there is something to report.

        Raises:
          NotFiniteError: with the step that it was.
        """
        for value in jax.tree.leaves(metrics):
            value.copy_to_host_async()
        self.flush()
        self._waiting, self.row = (step, metrics), None
        if step % self._every == 0 or step == self._total:
            self.flush()
            speed, wait = self._clock.lap(step)
            facts = {"lr": float(self._lr_fn(step - 1)), "images_per_s": speed * self.batch}
            facts |= {"data_wait": wait, "seconds": self._clock.seconds}
            self.row = {name: _mean(total, count) for name, (total, count) in self._sums.items()} | facts
            self._sums = {}

    def flush(self) -> None:
        """Looks at the newest step, too: what is not finite is neither evaluated nor saved."""
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        values = {name: (np.asarray(total, np.float64), float(n)) for name, (total, n) in metrics.items()}
        if not all(np.isfinite(total).all() for total, _ in values.values()):
            told = ", ".join(f"{name} {spell(_mean(*pair), '.6g')}" for name, pair in values.items())
            raise NotFiniteError(step, told)
        for name, (total, count) in values.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + total, before[1] + count)


class Report(Observer):
    """Writes `<workdir>/metrics.jsonl` (process 0 only) and console lines.

    Args:
      curves: also draws `<workdir>/curves.png` at every evaluation; without
        matplotlib it says so once.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        total: int,
        metrics: MetricBuffer | None = None,
        curves: bool = False,
        log: Log = print,
    ):
        self._path, self._picture = workdir / workdirs.METRICS, workdir / "curves.png"
        self._total, self._metrics, self._log = total, metrics, log
        self._writes = jax.process_index() == 0
        self._draws = curves and self._writes
        self._pending: list[str] = []
        self._flushed = time.monotonic()

    def resume(self, step: int, meta: Mapping[str, Any]) -> None:
        """Forgets what a killed session wrote after `step`: those steps are run again."""
        self.flush()
        if self._writes and self._path.exists():
            self._rewrite(row for row in workdirs.read_rows(self._path, self._log) if row["step"] <= step)

    def rows(self) -> list[dict[str, Any]]:
        """All that was written; a half-written last line is left out."""
        self.flush()
        return workdirs.read_rows(self._path)

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        paths.atomic_write(self._path, "".join(map(_line, rows)))

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Reports the means since the last report; `data` is the share of time without a batch.

        In brackets the unweighted losses that `loss` is the weighted sum of: `keep_ratio` is one of them.
        """
        if (row := self._metrics.row) is None:
            return
        self.write(step, "train", row)
        shown = {name: f"{name} {spell(value, '.4g')}" for name, value in row.items()}
        parts = ", ".join(text for name, text in shown.items() if name not in ("loss", *SIDE))
        norms = "".join(f"  {shown[name]}" for name in SIDE[-2:] if name in shown)
        left = (self._total - step) / (row["images_per_s"] / self._metrics.batch)
        self._log(
            f"step {step}/{self._total}  {100 * step / self._total:.1f}%  {row['images_per_s']:.4g} img/s  "
            f"data {100 * row['data_wait']:.0f}%  ETA {duration(left)}  lr {row['lr']:.3g}  "
            f"{shown['loss']} ({parts}){norms}"
        )

    def eval(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Reports an evaluation, in the place of an earlier one at this step; keys may carry the prefix `ema/`."""
        if self._writes and self.evaluated(step) is not None:
            self._rewrite(row for row in self.rows() if (row["step"], row["kind"]) != (step, "eval"))
        self.write(step, "eval", metrics)
        self.flush()
        values = "  ".join(
            f"{name} {spell(value, '.2f', 100)}%" if "top" in name else f"{name} {spell(value, '.6g')}"
            for name, value in metrics.items()
        )
        self._log(f"eval at step {step}/{self._total}  {values}")
        if not self._draws:
            return
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

    def write(self, step: int, kind: str, values: Mapping[str, Value]) -> None:
        """Adds a row."""
        if not self._writes:
            return
        self._pending.append(_line({"step": step, "kind": kind, **values}))
        # Nothing can be appended to an object of a storage service: it is written anew, so not at every row.
        if not paths.is_uri(self._path) or time.monotonic() > self._flushed + FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that are pending: those of a checkpoint must be there before it is."""
        if not self._pending:
            return
        text = "".join(self._pending)
        if paths.is_uri(self._path):
            before = self._path.read_text() if self._path.exists() else ""
            paths.atomic_write(self._path, before + text)
        else:
            with self._path.open("a") as file:
                file.write(text)
        self._pending, self._flushed = [], time.monotonic()

    close = flush


class Progress(Observer):
    """A live line on a terminal."""

    def __init__(self, total: int, metrics: MetricBuffer):
        self._total, self._metrics, self._bar = total, metrics, None

    def start(self, step: int) -> None:
        """Begins anew: the time of a compilation says nothing of that of a step."""
        self.close()
        self._bar = progress.bar("training", self._total, unit="steps", start=step)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Counts the step; between two reports it shows the loss of the last one."""
        self._bar.update(1)
        if (row := self._metrics.row) is not None and "loss" in row:
            self._bar.set_postfix_str(f"loss {spell(row['loss'], '.4g')}", refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Retention(Observer):
    """Which checkpoints outlive the newest: the best, and what a rewind goes back to.

    Decides by the run's own record of evaluations, the same on every process. Each checkpoint carries the
    scores so far, with its checksum: a record that is lost or damaged does not cost the best one.

    Args:
      metric: by which evaluations are ranked.
      best: how many of the best stay.
      rewind: whether the newest planned one stays.
      periods: a checkpoint is planned at every multiple of one of these steps (0: none).
    """

    def __init__(self, workdir: epath.Path, *, metric: str, best: int, rewind: bool, periods: Sequence[int]):
        self._record, self._metric = workdir / workdirs.METRICS, metric
        self._best, self._rewind, self._periods = best, rewind, periods
        self._scores: dict[int, float] = {}

    def planned(self, step: int) -> bool:
        """Whether a run saves at a step even if nobody stops it.

        A rewind goes back to such a step only: what a signal saved is there in
        the one run and not in the other.
        """
        return any(period > 0 and step % period == 0 for period in self._periods)

    def choose(self, steps: Iterable[int]) -> set[int]:
        """Those of some checkpoints that must stay, however many are newer."""
        steps = list(steps)
        ranked = workdirs.by_rank({step: self._scores[step] for step in steps if step in self._scores})
        return {*ranked[: self._best], *(sorted(filter(self.planned, steps))[-1:] if self._rewind else ())}

    def resume(self, step: int, meta: Mapping[str, Any]) -> None:
        """Takes over what the record says, and what the checkpoint has kept."""
        rows = [row for row in workdirs.read_rows(self._record) if row["step"] <= step]
        scores = workdirs.kept_scores(meta, self._metric) | workdirs.scores(rows, self._metric)
        self._scores = {int(step): score for step, score in multihost.of_first(list(scores.items()))}

    def eval(self, step: int, metrics: Mapping[str, Value]) -> None:
        if (score := workdirs.score(self._metric, metrics)) is not None:
            self._scores[step] = score

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        values = {str(step): finite(score) for step, score in self._scores.items()}
        return {"scores": {"metric": self._metric, "values": values}} if values else {}


def _mean(total: np.ndarray, count: float) -> Value:
    return (total / max(count, 1e-30)).tolist()


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


def duration(seconds: float) -> str:
    """`3h12m`, `4m05s` or `7s`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
