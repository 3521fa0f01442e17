"""Checked requests for batches, and the arithmetic of their rows that all sources share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from dyntoken.data.augment import AugmentOptions
from dyntoken.data.errors import DataError
from dyntoken.data.resample import check_interpolation
from dyntoken.data.splits import Part, count_rows, portion, slice_parts

MAX_RESIZED = 8192  # pixels of the shorter side before evaluation's crop


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What every request names: see `train_batches`."""

    parts: tuple[Part, ...]
    batch: int
    size: tuple[int, int]
    shards: int
    process: tuple[int, int]

    @property
    def count(self) -> int:
        """Examples of all parts."""
        return count_rows(self.parts)

    @property
    def per_shard(self) -> int:
        """Rows of a batch from each shard."""
        return self.batch // self.shards

    @property
    def local_rows(self) -> range:
        """The rows of the global batch that belong to this process."""
        index, processes = self.process
        return portion(self.batch, processes, index)

    @property
    def local_shards(self) -> range:
        index, processes = self.process
        return portion(self.shards, processes, index)

    def shard(self, number: int) -> range:
        """The rows of the split in a virtual shard."""
        return portion(self.count, self.shards, number)

    def shard_parts(self, number: int) -> tuple[Part, ...]:
        rows = self.shard(number)
        return slice_parts(self.parts, rows.start, rows.stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRequest(Request):
    """A request for training batches."""

    seed: int
    start_step: int
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
        if self.augment.repeats > 1 and self.per_shard < 2:
            raise DataError(
                f"augment.repeats needs two rows per data shard, else mixup pairs the views of an image: batch "
                f"{self.batch} on {self.shards} shards is too small"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRequest(Request):
    """A request for one pass over a split (see `eval_batches`)."""

    crop_pct: float
    interpolation: str
    named: bool = False

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
    def steps(self) -> int:
        return -(-self.count // self.batch)
