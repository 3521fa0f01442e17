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
from dyntoken.data.sources import Batch
from dyntoken.data.splits import Part, slice_parts
from dyntoken.data.tf_import import tensorflow

_ORDER = 0  # name of the draw that shuffles an epoch
_STORED = 20  # key of the fixed order of what is stored class after class
_CHUNK = 1024  # examples whose labels are read at a time


class Rows(Protocol):
    """One split: `take(indices)` gives uint8 `[n, H, W, C]`, int32 `[n]`."""

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


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
        return ArrayRows(*self.take(hash_rng.stratified(self.labels, _STORED, np.arange(len(self.labels)))))


@dataclasses.dataclass(frozen=True)
class ConcatRows:
    """Parts of splits laid end to end: (rows, first, one past the last)."""

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

    def labels(self) -> np.ndarray:
        """All labels, chunk by chunk."""
        count = sum(stop - start for _, start, stop in self.parts)
        chunks = np.split(np.arange(count), range(_CHUNK, count, _CHUNK))
        return np.concatenate([self.take(chunk)[1] for chunk in chunks])


def batch_positions(request: TrainRequest) -> np.ndarray:
    """Position in the epoch's order of each row of a batch, from the batch's first, int64 `[batch]`.

    With repeated augmentation that order is a a a b b b c c c ..., and its
    entries are dealt to the virtual shards in turn, as DeiT's RASampler deals
    them to the devices: the views of an image lie in different shards, whatever
    the number of devices, and never form a pair for mixup.
    """
    positions = np.arange(request.batch)
    if request.augment.repeats == 1:
        return positions
    return positions.reshape(-1, request.shards).T.ravel()


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

    def _join(self, parts: Sequence[Part]) -> ConcatRows:
        return ConcatRows([(self._rows(name), start, stop) for name, start, stop in parts])

    def _check_labels(self, labels: np.ndarray, parts: Sequence[Part], ids: np.ndarray) -> None:
        def spell(row: int) -> str:
            ((name, start, _),) = slice_parts(parts, ids[row], ids[row] + 1)
            return f"{name}[{start}]"

        check_labels(labels, spell, self.info)

    def train(self, request: TrainRequest) -> Iterator[Batch]:
        distortion = request.augment.distortion(self.info.mean)
        if distortion is not None:
            tensorflow()  # said now if it is absent
        return self._train(request, distortion)

    def _train(self, request: TrainRequest, distortion: Distortion | None) -> Iterator[Batch]:
        rows, seed, options = self._join(request.parts), request.seed, request.augment
        known_labels = rows.labels() if request.balance else None
        positions = batch_positions(request)[request.local_rows]
        step, ordered = request.start_step, None
        while True:
            epoch, number = divmod(step, request.steps_per_epoch)
            if epoch != ordered:
                ordered, keys = epoch, (seed, epoch, _ORDER)
                if known_labels is None:
                    order = hash_rng.permutation(request.count, *keys)
                else:
                    order = hash_rng.balanced(known_labels, *keys)
            image, view = np.divmod(number * request.batch + positions, options.repeats)
            ids = order[image]
            images, labels = rows.take(ids)
            self._check_labels(labels, request.parts, ids)
            # Every view has draws of its own, and every time that a balanced epoch shows an image.
            draws = (ids if known_labels is None else image) + view * request.count
            images = augment(images, draws, seed, epoch, request.size, options, distortion)
            yield {"image": images, "label": labels, "mask": np.ones(len(ids), np.float32)}
            step += 1

    def evaluate(self, request: EvalRequest) -> Iterator[Batch]:
        rows = self._join(request.parts)
        for step in range(request.steps):
            ids = step * request.batch + np.array(request.local_rows)
            mask = ids < request.count
            images, labels = rows.take(np.where(mask, ids, 0))
            labels = labels * mask.astype(np.int32)
            self._check_labels(labels, request.parts, ids)
            if images.shape[1:3] != request.size:
                images = resize_centre(images, request.size, request.crop_pct, request.interpolation)
            images = images * mask[:, None, None, None].astype(np.uint8)
            names = {"name": ids.astype(np.bytes_)} if request.named else {}
            yield {"image": images, "label": labels, "mask": mask.astype(np.float32), **names}
