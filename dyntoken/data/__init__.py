"""Images and labels, step by step: `batch = f(seed, step)`.

Nothing is carried from batch to batch: an iterator started at step k yields
what an uninterrupted one yields from step k on, so a resumed run needs no
iterator state. A training epoch is `count // batch` batches of a permutation
seeded by (seed, epoch); what is left over is dropped and differs from epoch to
epoch. Crops, flips and RandAugment are keyed by (seed, epoch, example, view); an
image that does not decode never shifts the others (`stream`).

The data set has `shards` fixed virtual shards, whatever the number of
processes, and the global batch is shard-major: process p of P yields rows
`p * batch / P .. (p + 1) * batch / P - 1` of it. The processes' batches, put
together in order, are the batch of a single process, bit for bit.

Batches are `{"image": uint8 [b, H, W, C], "label": int32 [b], "mask": float32
[b]}`, mask 0 for the padding of evaluation. Normalisation is the device's job,
with `info(name).mean` and `.std`. Evaluation batches of `imagenet2012_real`
hold `labels` bool `[b, 1000]` besides: every label that fits the image (Beyer et
al., arXiv:2006.07159); images that none fits have mask 0.

The embedded `fashion_mnist_mini` and the generated `fake` need numpy alone. Any
other name is a TFDS data set (`name`, `name:version`, `name/config:version`)
that is already on disk under `data_dir`, else `$TFDS_DATA_DIR`, else
`~/tensorflow_datasets`. `folder:DIR` is a folder per class (`folder`). Nothing
is ever downloaded.

Splits are cut, sharded and paired in the order in which a source has them, which so
is a random one, the same on every host whatever the seed of a run: TFDS shuffles what
it writes; folders, and sets in memory that were written in order, are put into a fixed
random order (`hash_rng.stratified`); streamed ones in order are refused for training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from dyntoken.data.augment import AugmentOptions
from dyntoken.data.errors import DataError, MissingDataError, warn_once
from dyntoken.data.in_memory import ArrayRows, ArraySource
from dyntoken.data.info import DataInfo
from dyntoken.data.prefetching import Prefetch, prefetch
from dyntoken.data.requests import EvalRequest, TrainRequest, check_size
from dyntoken.data.sources import SOURCES, Batch, open_source, register_data, source_options
from dyntoken.data.splits import count_rows, parse_split
from dyntoken.schema import Count, Interpolation, Size, within

__all__ = [
    "SOURCES",
    "ArrayRows",
    "ArraySource",
    "AugmentOptions",
    "Batch",
    "DataError",
    "DataInfo",
    "MissingDataError",
    "Prefetch",
    "eval_batches",
    "info",
    "prefetch",
    "register_data",
    "source_options",
    "steps_per_epoch",
    "train_batches",
]


def info(name: str, data_dir: str | None = None, **options: Any) -> DataInfo:
    """Describes a data set: a row of `SOURCES`, a TFDS name or `folder:DIR`, with the source's own options.

    The common TFDS sets are described from a table while they are not on disk.

    Raises:
      UnknownNameError: no such data set or option.
      MissingDataError: not on disk; the message has the command that makes it.
    """
    return open_source(name, data_dir, **options).info


def train_batches(
    name: str,
    *,
    split: str | Sequence[str] = "train",
    batch: int,
    size: int | tuple[int, int] | None = None,
    seed: int,
    start_step: int = 0,
    shards: int = 8,
    process: tuple[int, int] = (0, 1),
    data_dir: str | None = None,
    augment: Mapping[str, Any] | AugmentOptions | None = None,
    balance: bool = False,
    **options: Any,
) -> Iterator[Batch]:
    """An endless iterator of shuffled, augmented training batches.

    Args:
      name, data_dir, **options: as in `info`.
      split: "train", "train[:90%]", "train+validation" or a sequence of these.
      batch: rows of the global batch, a multiple of `shards`.
      size: pixels of the result, one number or (height, width); None keeps the
        source's.
      seed: of the order and of the augmentation.
      start_step: the first step to yield.
      shards: virtual shards, a multiple of the number of processes. For
        streamed sets (ImageNet) another number gives other batches.
      process: (index, number of processes).
      augment: `AugmentOptions` or its fields; None changes nothing beyond a
        resize and centre crop where the size differs.
      balance: an epoch of the same length has every class equally often, rare
        images several times; for folders and sets in memory.

    Raises:
      DataError: see the message; raised by this call, not by the first `next`.
    """
    source = open_source(name, data_dir, **options)
    known = source.info
    own = {"seed": seed, "start_step": start_step, "augment": AugmentOptions.of(augment), "balance": balance}
    request = TrainRequest(
        **_rows(name, known, split, size), batch=batch, shards=shards, process=process, **own
    )
    if known.num_classes == 1:
        warn_once(
            f"data set {name!r} has a single class{''.join(f' ({c!r})' for c in known.class_names)}, so there is "
            "nothing to tell apart: a folder of images needs a folder per class"
        )
    return source.train(request)


def _rows(name: str, known: DataInfo, split: Any, size: Any) -> dict[str, Any]:
    return {"parts": parse_split(name, split, known.splits), "size": check_size(size, known.image_shape)}


def eval_batches(
    name: str,
    *,
    split: str | Sequence[str] = "test",
    batch: Count,
    size: Size | None = None,
    shards: Count = 8,
    process: tuple[int, int] = (0, 1),
    data_dir: str | None = None,
    crop_pct: Annotated[float, within("[0.05, 1]")] = 0.875,
    interpolation: Interpolation = "bicubic",
    named: bool = False,
    **options: Any,
) -> Iterator[Batch]:
    """One pass over a split, each example exactly once.

    The last batch is padded with black images of label 0 and mask 0; every
    process yields the same number of equal batches. Images of the right size
    pass through untouched, others are resized so that the shorter side is
    `int(size / crop_pct)` and cropped at the centre. Sets in memory keep their
    order; streamed ones come shard by shard within each batch.

    Args:
      batch: rows of the global batch, a multiple of the number of processes; it
        need not divide by `shards`.
      crop_pct: share of the resized side that the crop keeps.
      interpolation: "bicubic" or "bilinear", antialiased.
      named: batches also hold `name`, bytes `[b]`: an example's file or record, in memory its number.
      others: as in `train_batches`.

    Raises:
      DataError: see the message; raised by this call, not by the first `next`.
    """
    source = open_source(name, data_dir, **options)
    rows = _rows(name, source.info, split, size)
    own = {"crop_pct": crop_pct, "interpolation": interpolation, "named": named}
    return source.evaluate(EvalRequest(**rows, batch=batch, shards=shards, process=process, **own))


def steps_per_epoch(
    name: str,
    split: str | Sequence[str],
    batch: int,
    data_dir: str | None = None,
    *,
    multiple: int = 1,
    **options: Any,
) -> int:
    """Training batches per epoch, `count // batch`.

    Args:
      multiple: of what a batch must be, which the one that is proposed instead is.

    Raises:
      DataError: the split has fewer than `batch` examples.
    """
    count = count_rows(parse_split(name, split, info(name, data_dir, **options).splits))
    if count < batch:
        most = count // multiple * multiple
        remedy = f"use at most {most}" if most else f"no multiple of {multiple} fits, lower data.shards"
        raise DataError(f"batch {batch} is larger than the split ({count} images): {remedy}")
    return count // batch
