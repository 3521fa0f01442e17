"""Data sets whose rows can be read at random: batches in plain numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from dyntoken.data import hash_rng
from dyntoken.data.augment import augment
from dyntoken.data.info import DataInfo, check_labels
from dyntoken.data.randaugment import Distortion
from dyntoken.data.requests import EvalRequest, TrainRequest
from dyntoken.data.resample import resize_centre
from dyntoken.data.splits import Part, slice_parts
from dyntoken.data.tf_import import tensorflow

Batch = dict[str, np.ndarray]
_ORDER = 0  # name of the draw that shuffles an epoch
_STORED = 20  # key of the fixed order of what is stored class after class
_CHUNK = 1024  # examples whose labels are read at a time


class Rows(Protocol):
    """One split: `take(indices)` gives uint8 `[n, H, W, C]`, int32 `[n]`."""

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


class Source(Protocol):
    """A data set: its description, and batches for a checked plan."""

    @property
    def info(self) -> DataInfo: ...

    def train(self, plan: TrainRequest) -> Iterator[Batch]: ...

    def evaluate(self, plan: EvalRequest) -> Iterator[Batch]: ...


@dataclasses.dataclass(frozen=True)
class ArrayRows:
    """A split held in memory: uint8 `[N, H, W, C]` and int32 `[N]`."""

    images: np.ndarray
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.images[indices], self.labels[indices]

    def stratified(self) -> ArrayRows:
        """The same rows in a fixed random order, for what is stored class after class.

        Any slice of it holds its share of every class; it is the same on every host.
        """
        order = hash_rng.stratified(self.labels, _STORED, np.arange(len(self.labels)))
        return ArrayRows(self.images[order], self.labels[order])


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


def _labels(rows: Rows, count: int) -> np.ndarray:
    """All labels, `[count]`, chunk by chunk."""
    chunks = (np.arange(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
    return np.concatenate([rows.take(chunk)[1] for chunk in chunks])


def _spell(parts: Sequence[Part], row: int) -> str:
    """A row of joined parts by its split and its place there."""
    ((name, start, _),) = slice_parts(parts, row, row + 1)
    return f"{name}[{start}]"


def _places(plan: TrainRequest) -> np.ndarray:
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
    a range of it, so what a process yields depends on nothing but its rows. Slices
    (`train[:90%]`) are ranges of the rows as they are stored, which so must lie in
    random order (`ArrayRows.stratified`). An epoch of `balance` has every class
    equally often (`hash_rng.balanced`).
    """

    def __init__(self, info: DataInfo, rows: Callable[[str], Rows] | Mapping[str, Rows]):
        """Args: info; rows: split name -> `Rows` (called or looked up on use)."""
        self.info = info
        self._rows = rows if callable(rows) else rows.__getitem__

    def _join(self, parts: Sequence[Part]) -> _Joined:
        return _Joined([(self._rows(name), start, stop) for name, start, stop in parts])

    def train(self, plan: TrainRequest) -> Iterator[Batch]:
        distortion = plan.augment.distortion(self.info.mean)
        if distortion is not None:
            tensorflow()  # said now if it is absent
        return self._train(plan, distortion)

    def _train(self, plan: TrainRequest, distortion: Distortion | None) -> Iterator[Batch]:
        rows, mine = self._join(plan.parts), plan.local_rows
        known_labels = _labels(rows, plan.count) if plan.balance else None
        places, repeats = _places(plan)[mine.start : mine.stop], plan.augment.repeats
        step, known, order = plan.start_step, -1, np.zeros(0, np.int64)
        while True:
            epoch, position = divmod(step, plan.steps_per_epoch)
            if epoch != known:
                known, keys = epoch, (plan.seed, epoch, _ORDER)
                if known_labels is None:
                    order = hash_rng.permutation(plan.count, *keys)
                else:
                    order = hash_rng.balanced(known_labels, *keys)
            image, view = np.divmod(position * plan.batch + places, repeats)
            ids = order[image]
            images, labels = rows.take(ids)
            check_labels(labels, lambda row, ids=ids: _spell(plan.parts, ids[row]), self.info)
            # Every view has draws of its own, and every time that a balanced epoch shows an image.
            draws = (ids if known_labels is None else image) + view * plan.count
            images = augment(images, draws, plan.seed, epoch, plan.size, plan.augment, distortion)
            yield {"image": images, "label": labels, "mask": np.ones(len(ids), np.float32)}
            step += 1

    def evaluate(self, plan: EvalRequest) -> Iterator[Batch]:
        rows, mine = self._join(plan.parts), plan.local_rows
        for step in range(plan.steps):
            ids = step * plan.batch + np.array(mine)
            mask = ids < plan.count
            images, labels = rows.take(np.where(mask, ids, 0))
            check_labels(labels * mask, lambda row, ids=ids: _spell(plan.parts, ids[row]), self.info)
            if images.shape[1:3] != plan.size:
                images = resize_centre(images, plan.size, plan.crop_pct, plan.interpolation)
            yield {
                "image": images * mask[:, None, None, None].astype(np.uint8),
                "label": labels * mask.astype(np.int32),
                "mask": mask.astype(np.float32),
            }
