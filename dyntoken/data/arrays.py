"""Data sets whose rows can be read at random: batches in plain numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from dyntoken.data import stateless
from dyntoken.data.augment import augment
from dyntoken.data.distort import Distortion
from dyntoken.data.plan import DataInfo, EvalPlan, Part, TrainPlan, local_rows
from dyntoken.data.resample import resize_centre
from dyntoken.data.tf_import import tensorflow

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


def _places(plan: TrainPlan) -> np.ndarray:
    """Place in the epoch's order of each row of a batch, from the batch's first, int64 `[batch]`.

    With repeated augmentation that order is a a a b b b c c c ..., and its
    entries are dealt to the virtual shards in turn, as DeiT's RASampler deals
    them to the devices: the views of an image lie in different shards, whatever
    the number of devices, and never form a pair for mixup.
    """
    places = np.arange(plan.batch)
    if plan.augment.repeats == 1:
        return places
    return places.reshape(-1, plan.shards).T.ravel()


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
        distortion = plan.augment.distortion(self.info.mean)
        if distortion is not None:
            tensorflow()  # said now if it is absent
        return self._train(plan, distortion)

    def _train(self, plan: TrainPlan, distortion: Distortion | None) -> Iterator[Batch]:
        rows, mine = self._join(plan.parts), local_rows(plan.batch, plan.process)
        places, repeats = _places(plan)[mine], plan.augment.repeats
        step, known, order = plan.start_step, -1, np.zeros(0, np.int64)
        while True:
            epoch, position = divmod(step, plan.steps_per_epoch)
            if epoch != known:
                known, order = epoch, stateless.permutation(plan.count, plan.seed, epoch, _ORDER)
            image, view = np.divmod(position * plan.batch + places, repeats)
            ids = order[image]
            images, labels = rows.take(ids)
            keys = ids + view * plan.count  # every view has draws of its own
            images = augment(images, keys, plan.seed, epoch, plan.size, plan.augment, distortion)
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
