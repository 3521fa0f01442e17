"""Checked requests: which rows of which split make up a batch."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dyntoken.data.augment import AugmentOptions
from dyntoken.data.errors import DataError
from dyntoken.data.resample import check_interpolation
from dyntoken.registry import suggest

Part = tuple[str, int, int]  # split name, first row, one past the last row
MAX_RESIZED = 8192  # pixels of the shorter side before evaluation's crop
_PART = re.compile(r"^([^\[\]+:]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?$")


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a model and a trainer want to know of a data set.

    Attributes:
      name: as it was asked for.
      num_classes: number of labels, `0 .. num_classes - 1`.
      image_shape: `(H, W, C)`, or None where images differ in size.
      splits: split name -> number of examples.
      mean, std: per channel, of pixels scaled to [0, 1].
      class_names: one per class, or () where the source names none.
      several_labels: evaluation batches hold `labels` besides `label`.
      channels: colour channels of the batches.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int] | None
    splits: Mapping[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    several_labels: bool = False

    @property
    def channels(self) -> int:
        return len(self.mean)


def same_classes(one: DataInfo, other: DataInfo) -> str | None:
    """What two sets' labels do not share, as the end of a sentence; None if nothing.

    Names are compared where both sets have them, in the order of the labels.
    """
    if one.num_classes != other.num_classes:
        return f"{one.name} has {one.num_classes} classes, {other.name} {other.num_classes}"
    for label, (here, there) in enumerate(zip(one.class_names, other.class_names, strict=False)):
        if here != there:
            return f"label {label} is {here!r} in {one.name} and {there!r} in {other.name}"
    return None


def check_labels(labels: np.ndarray, name: Callable[[int], Any], info: DataInfo) -> None:
    """Raises `DataError` for a label outside the classes; `name(row)` says whose it is."""
    wrong = np.flatnonzero((labels < 0) | (labels >= info.num_classes))
    if len(wrong):
        raise DataError(
            f"data set {info.name!r}: example {name(wrong[0])} has label {labels[wrong[0]]}, but the classes are "
            f"0 .. {info.num_classes - 1}: repair it, or leave its split out (-1 is what unlabelled ones carry)"
        )


def _bound(text: str | None, count: int, default: int, what: str) -> int:
    if text is None:
        return default
    value, most = (int(text[:-1]), 100) if text.endswith("%") else (int(text), count)
    if abs(value) > most:
        raise DataError(f"{what}: {text} lies outside the split's {count} examples")
    rows = round(value * count / 100) if text.endswith("%") else value
    return rows + count if value < 0 else rows


def parse_split(name: str, split: str | Sequence[str], counts: Mapping[str, int]) -> tuple[Part, ...]:
    """Reads `"train"`, `"train[:90%]"`, `"train+test"` or a sequence of these.

    Args:
      name: the data set, for messages.
      split: slices are in examples or per cent, in TFDS' spelling; several
        parts follow each other.
      counts: examples per split.

    Returns:
      One (split, start, stop) per part.

    Raises:
      DataError: no such split, bad syntax, a slice beyond the split, or a part without examples.
    """
    texts = split.split("+") if isinstance(split, str) else [t for s in split for t in s.split("+")]
    parts = []
    for text in texts:
        match = _PART.match(text.strip())
        if match is None:
            raise DataError(f"split {text!r} is not of the form 'train', 'train[:90%]' or 'train[100:]'")
        key, first, last = match.groups()
        if key not in counts:
            raise DataError(f"data set {name!r} has no split {key!r}: {suggest(key, counts)}")
        what = f"split {text!r} of data set {name!r}"
        start, stop = _bound(first, counts[key], 0, what), _bound(last, counts[key], counts[key], what)
        if stop <= start:
            raise DataError(f"{what} holds no example: rows {start} to {stop} of {counts[key]}")
        parts.append((key, start, stop))
    if not parts:
        raise DataError(f"split {split!r} of data set {name!r} holds no example")
    return tuple(parts)


def count_rows(parts: Sequence[Part]) -> int:
    """Number of examples in all parts together."""
    return sum(stop - start for _, start, stop in parts)


def slice_parts(parts: Sequence[Part], start: int, stop: int) -> tuple[Part, ...]:
    """Rows `start .. stop - 1` of the parts laid end to end, as parts."""
    out, base = [], 0
    for name, first, last in parts:
        size = last - first
        low, high = max(start - base, 0), min(stop - base, size)
        if high > low:
            out.append((name, first + low, first + high))
        base += size
    return tuple(out)


def check_size(size: int | Sequence[int] | None, native: tuple[int, ...] | None) -> tuple[int, int]:
    """(height, width) of the batches; None asks for the source's own size."""
    if size is None:
        if native is None:
            raise DataError("images of this data set differ in size: give size=(height, width) or one number")
        return native[0], native[1]
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
        raise DataError(f"size={size!r} is not a positive number of pixels or a (height, width) pair of them")
    return pair


def _check_process(process: Sequence[int], **counts: int) -> None:
    index, processes = process
    for what, value in {**counts, "the number of processes": processes}.items():
        if value < 1:
            raise DataError(f"{what} is {value}; it must be at least 1")
    if not 0 <= index < processes:
        raise DataError(f"process=({index}, {processes}): the index must lie in 0 .. {processes - 1}")


def check_eval_batch(batch: int, process: Sequence[int]) -> None:
    """Raises `DataError` unless the batch divides among the processes."""
    _check_process(process, batch=batch)
    if batch % process[1]:
        raise DataError(
            f"evaluation batch {batch} does not divide among {process[1]} processes: use a multiple of {process[1]}"
        )


def check_topology(batch: int, shards: int, process: Sequence[int]) -> None:
    """Raises `DataError` unless batch / shards / processes divide evenly."""
    _check_process(process, batch=batch, shards=shards)
    if shards % process[1]:
        raise DataError(
            f"{shards} data shards do not divide among {process[1]} processes: set shards to a multiple "
            f"of {process[1]} (it also changes which images meet in a batch)"
        )
    if batch % shards:
        low = batch // shards * shards
        nearest = f"{low} or {low + shards}" if low else f"{shards}"
        raise DataError(
            f"batch {batch} is not divisible by the {shards} data shards: use {nearest}, or set data.shards"
        )


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """A checked request for training batches (see `train_batches`)."""

    parts: tuple[Part, ...]
    batch: int
    size: tuple[int, int]
    seed: int
    start_step: int
    shards: int
    process: tuple[int, int]
    augment: AugmentOptions
    balance: bool = False

    def __post_init__(self):
        check_topology(self.batch, self.shards, self.process)
        if self.start_step < 0:
            raise DataError(f"start_step is {self.start_step}; it must be 0 or more")
        if self.steps_per_epoch < 1:
            raise DataError(
                f"batch {self.batch} is larger than the split ({self.count} images): use at most "
                f"{max(self.count // self.shards, 1) * self.shards}"
            )
        if self.augment.repeats > self.shards:
            raise DataError(
                f"augment.repeats={self.augment.repeats} needs as many data shards, not {self.shards} (the "
                "views of an image lie in different shards): set shards or repeats"
            )
        if self.augment.repeats > 1 and self.batch < 2 * self.shards:
            raise DataError(
                f"augment.repeats needs two rows per data shard, else mixup pairs the views of an image: batch "
                f"{self.batch} on {self.shards} shards is too small"
            )

    @property
    def count(self) -> int:
        return count_rows(self.parts)

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch


@dataclasses.dataclass(frozen=True)
class EvalPlan:
    """A checked request for one pass over a split (see `eval_batches`)."""

    parts: tuple[Part, ...]
    batch: int
    size: tuple[int, int]
    shards: int
    process: tuple[int, int]
    crop_pct: float
    interpolation: str

    def __post_init__(self):
        check_eval_batch(self.batch, self.process)
        check_interpolation(self.interpolation)
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct is {self.crop_pct}; it must lie in (0, 1]")
        if max(self.size) > MAX_RESIZED * self.crop_pct:
            raise DataError(
                f"crop_pct {self.crop_pct} of {max(self.size)} pixels: a resized side has at most {MAX_RESIZED}"
            )
        # Streamed sets are read from as many places at a time; what is yielded in all is the same.
        shards = math.gcd(self.batch, max(self.shards, 1))
        object.__setattr__(self, "shards", shards if shards % self.process[1] == 0 else self.process[1])

    @property
    def count(self) -> int:
        return count_rows(self.parts)

    @property
    def steps(self) -> int:
        return -(-self.count // self.batch)


def local_rows(batch: int, process: tuple[int, int]) -> slice:
    """The rows of the global batch that belong to a process."""
    index, processes = process
    return slice(index * batch // processes, (index + 1) * batch // processes)
