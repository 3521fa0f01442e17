"""Data sets whose rows can be read at random: batches in plain numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from dyntoken.data import stateless
from dyntoken.data.augment import augment
from dyntoken.data.plan import DataInfo, EvalPlan, Part, TrainPlan, local_rows
from dyntoken.data.resample import resize_centre

Batch = dict[str, np.ndarray]
_ORDER = 0  # name of the draw that shuffles an epoch


class Rows(Protocol):
    """One split: `take(indices)` gives uint8 `[n, H, W, C]`, int32 `[n]`."""

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


class Source(Protocol):
    """A data set: its description, and batches for a checked plan."""

    @property
    def info(self) -> DataInfo: ...

    def train(self, plan: TrainPlan) -> Iterator[Batch]: ...

    def evaluate(self, plan: EvalPlan) -> Iterator[Batch]: ...


@dataclasses.dataclass(frozen=True)
class ArrayRows:
    """A split held in memory: uint8 `[N, H, W, C]` and int32 `[N]`."""

    images: np.ndarray
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.images[indices], self.labels[indices]


@dataclasses.dataclass(frozen=True)
class _Joined:
    """Parts of splits laid end to end."""

    parts: Sequence[tuple[Rows, int, int]]

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, start, _ = self.parts[0]
        if len(self.parts) == 1:
            return rows.take(indices + start)
        images, labels, base = None, np.zeros(len(indices), np.int32), 0
        for rows, start, stop in self.parts:
            here = (indices >= base) & (indices < base + stop - start)
            some, labels[here] = rows.take(indices[here] - base + start)
            if images is None:
                images = np.zeros((len(indices), *some.shape[1:]), np.uint8)
            images[here] = some
            base += stop - start
        return images, labels


class ArraySource:
    """A `Source` over random-access rows.

    The order of an epoch is one permutation of the whole split, and a batch is
    a range of it, so what a process yields depends on nothing but its rows.
    """

    def __init__(self, info: DataInfo, rows: Callable[[str], Rows] | Mapping[str, Rows]):
        """Args: info; rows: split name -> `Rows` (called or looked up on use)."""
        self.info = info
        self._rows = rows if callable(rows) else rows.__getitem__

    def _join(self, parts: Sequence[Part]) -> _Joined:
        return _Joined([(self._rows(name), start, stop) for name, start, stop in parts])

    def train(self, plan: TrainPlan) -> Iterator[Batch]:
        rows, mine = self._join(plan.parts), local_rows(plan.batch, plan.process)
        step, known, order = plan.start_step, -1, np.zeros(0, np.int64)
        while True:
            epoch, position = divmod(step, plan.steps_per_epoch)
            if epoch != known:
                known, order = epoch, stateless.permutation(plan.count, plan.seed, epoch, _ORDER)
            ids = order[position * plan.batch : (position + 1) * plan.batch][mine]
            images, labels = rows.take(ids)
            images = augment(images, ids, plan.seed, epoch, plan.size, plan.augment)
            yield {"image": images, "label": labels, "mask": np.ones(len(ids), np.float32)}
            step += 1

    def evaluate(self, plan: EvalPlan) -> Iterator[Batch]:
        rows, mine = self._join(plan.parts), local_rows(plan.batch, plan.process)
        for step in range(plan.steps):
            ids = np.arange(step * plan.batch, (step + 1) * plan.batch)[mine]
            mask = ids < plan.count
            images, labels = rows.take(np.where(mask, ids, 0))
            if images.shape[1:3] != plan.size:
                images = resize_centre(images, plan.size, plan.crop_pct, plan.interpolation)
            yield {
                "image": images * mask[:, None, None, None].astype(np.uint8),
                "label": labels * mask.astype(np.int32),
                "mask": mask.astype(np.float32),
            }
