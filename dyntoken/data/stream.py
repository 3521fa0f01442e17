"""Sets too big for memory through tf.data: records are shuffled and skipped undecoded.

Virtual shard s of S reads a fixed range of the split, in an order drawn from
(seed, epoch, s); a batch takes `batch / S` records of each shard in turn. Only
what a batch needs is decoded, and JPEGs only where the crop lies.

With repeated augmentation row j of a shard's epoch shows view `j % repeats` of
record `j // repeats` of the shard that lies `j % repeats` places before it: the
views of an image lie in different shards and in the same batch or the next.

An image that does not decode is counted and named, and changes no other row: in
training the row before it in its shard's part of the batch (the last, for the
first) takes its place, in evaluation it is masked. That depends on the batch
alone, so a resumed run and any number of processes see the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from dyntoken.data import stateless
from dyntoken.data.arrays import Batch
from dyntoken.data.augment import AugmentOptions
from dyntoken.data.errors import DataError
from dyntoken.data.plan import DataInfo, EvalPlan, Part, TrainPlan, slice_parts
from dyntoken.data.tf_image import compiled_eval, compiled_train, distort_image
from dyntoken.data.tf_import import tensorflow

MAX_CORRUPT = 50  # images, before a run gives up
_FILES, _RECORDS, _AUGMENT = 3, 4, 5  # names of the draws
_SHARD_BITS = 40  # an example's number is shard << 40 | view << 36 | position in the shard's epoch
_VIEW_BITS = 36
_log = logging.getLogger(__name__)


class Records(Protocol):
    """Encoded images on disk.

    `rows(parts, key)` is a tf.data.Dataset of (pointer, int32 label, name) or
    (pointer, int32 label, name, bool `[K]`: every label that fits), in stored
    order or, given a key, in an order drawn from it; `load(pointer)`
    gives the encoded image; `buffer` is the size of the shuffle buffer that the
    drawn order still wants, 0 for none.
    """

    buffer: int

    def rows(self, parts: Sequence[Part], key: tuple[int, ...] | None) -> Any: ...

    def load(self, pointer: Any) -> Any: ...


def _int63(*parts: int) -> int:
    return int(stateless.bits(*parts)[0] >> np.uint64(1))


def shard_range(count: int, shards: int, shard: int) -> tuple[int, int]:
    """First row and one past the last row of a virtual shard."""
    return shard * count // shards, (shard + 1) * count // shards


class StreamSource:
    """A `Source` over records."""

    def __init__(self, records: Records, info: DataInfo, max_corrupt: int = MAX_CORRUPT):
        """Args: records; info; max_corrupt: images that may fail to decode before an iterator raises."""
        self.info = info
        self._records = records
        self._max_corrupt = max_corrupt

    def _shard(self, plan: TrainPlan, epoch: int, shard: int) -> Any:
        """(number, row) of one data shard in the order of an epoch."""
        rows = slice_parts(plan.parts, *shard_range(plan.count, plan.shards, shard))
        records = self._records.rows(rows, (plan.seed, epoch, _FILES, shard))
        buffer = self._records.buffer // plan.augment.repeats  # as many readers, the same memory
        if buffer:
            seed = _int63(plan.seed, epoch, _RECORDS, shard)
            records = records.shuffle(buffer, seed=seed, reshuffle_each_iteration=False)
        return records.enumerate(shard << _SHARD_BITS)

    def _views(self, plan: TrainPlan, epoch: int, shard: int, skip: int) -> Any:
        """What a virtual shard yields in an epoch after `skip` rows."""
        tf = tensorflow()
        repeats = plan.augment.repeats
        if repeats == 1:
            return self._shard(plan, epoch, shard).skip(skip)
        streams = []
        for view in range(repeats):
            rows = self._shard(plan, epoch, (shard - view) % plan.shards)
            rows = rows.map(lambda number, row, view=view: (number + (view << _VIEW_BITS), row))
            streams.append(rows)
        return _in_turn(tf, streams, 1).skip(skip)

    def _epoch(self, plan: TrainPlan, epoch: int, skip: int) -> Iterator[Batch]:
        """The batches of one epoch from batch `skip` on, with `bad` and `name`."""
        tf = tensorflow()
        per_shard, steps = plan.batch // plan.shards, plan.steps_per_epoch
        streams = [self._views(plan, epoch, s, skip * per_shard) for s in _local_shards(plan)]
        local, key = per_shard * len(streams), _int63(plan.seed, epoch, _AUGMENT)
        shape, distortion = (*plan.size, self.info.channels), plan.augment.distortion(self.info.mean)
        decode = _guarded(tf, compiled_train(plan.size, shape[-1], plan.augment), shape)

        def example(number: Any, row: Any) -> dict[str, Any]:
            seed = tf.stack([key, number])
            image, bad = decode(self._records.load(row[0]), seed)
            if distortion is not None:
                image = distort_image(image, seed, distortion)
            return {"image": image, "label": row[1], "mask": 1.0, "bad": bad, "name": row[2]}

        return _batches(tf, _in_turn(tf, streams, per_shard), example, local, steps - skip)

    def train(self, plan: TrainPlan) -> Iterator[Batch]:
        _check_streamable(self.info, plan.augment)
        plan.augment.distortion(self.info.mean)
        log, per_shard = _Corrupt(self.info.name, self._max_corrupt), plan.batch // plan.shards

        def run() -> Iterator[Batch]:
            epoch, skip = divmod(plan.start_step, plan.steps_per_epoch)
            while True:
                for batch in self._epoch(plan, epoch, skip):
                    yield replace_bad(batch, per_shard, log)
                epoch, skip = epoch + 1, 0

        return run()

    def evaluate(self, plan: EvalPlan) -> Iterator[Batch]:
        tf = tensorflow()
        per_shard, streams = plan.batch // plan.shards, []
        for shard in _local_shards(plan):
            rows = slice_parts(plan.parts, *shard_range(plan.count, plan.shards, shard))
            rows = self._records.rows(rows, None).map(lambda *row: (row, 1.0))
            padding = rows.element_spec[0]
            empty = tuple(tf.zeros(spec.shape, spec.dtype) for spec in padding)
            rows = rows.concatenate(tf.data.Dataset.from_tensors((empty, 0.0)).repeat())
            streams.append(rows.take(plan.steps * per_shard))
        shape = (*plan.size, self.info.channels)

        decode = compiled_eval(plan.size, shape[-1], plan.crop_pct, plan.interpolation)
        decode = _guarded(tf, decode, shape)

        def example(row: Any, mask: Any) -> dict[str, Any]:
            image, bad = tf.cond(
                mask > 0.0,
                lambda: decode(self._records.load(row[0])),
                lambda: (tf.zeros(shape, tf.uint8), False),
            )
            out = {"image": image, "label": row[1], "mask": mask, "bad": bad, "name": row[2]}
            if len(row) > 3:  # what no label fits is not evaluated
                out |= {"labels": row[3], "mask": mask * tf.cast(tf.reduce_any(row[3]), tf.float32)}
            return out

        log = _Corrupt(self.info.name, self._max_corrupt)
        rows = _in_turn(tf, streams, per_shard)
        batches = _batches(tf, rows, example, per_shard * len(streams), plan.steps)
        return (mask_bad(batch, log) for batch in batches)


class _Corrupt:
    """Names and counts images that do not decode."""

    def __init__(self, name: str, limit: int):
        self._name, self._limit, self._seen = name, limit, set()

    def report(self, names: Sequence[bytes], instead: str) -> None:
        for name in (n.decode(errors="replace") for n in names):
            if name in self._seen:
                continue
            self._seen.add(name)
            count = len(self._seen)
            if count > self._limit:
                raise DataError(
                    f"image {name} of data set {self._name!r} does not decode, the {count}th: more than "
                    f"max_corrupt={self._limit}; repair the set, or raise data.options.max_corrupt"
                )
            _log.warning("image %s does not decode (%d so far): %s", name, count, instead)


def replace_bad(batch: Batch, per_shard: int, log: _Corrupt) -> Batch:
    """Fills each row that did not decode with the good one before it in its shard.

    Args:
      batch: with `bad` bool `[b]` and `name` bytes `[b]`, which are taken out.
      per_shard: rows of each virtual shard.
      log: told the names.

    Raises:
      DataError: a shard has no good row, or the log's limit is reached.
    """
    bad, names = batch.pop("bad"), batch.pop("name")
    if not bad.any():
        return batch
    log.report(names[bad], "another image of the batch takes its place")
    source = np.arange(len(bad))
    for row in np.flatnonzero(bad):
        first = row // per_shard * per_shard
        ring = first + (row - first - 1 - np.arange(per_shard - 1)) % per_shard
        good = ring[~bad[ring]]
        if not len(good):
            raise DataError(
                f"none of the {per_shard} images of a batch's shard decodes, {names[row]!r} among them"
            )
        source[row] = good[0]
    return {key: value[source] for key, value in batch.items()}


def mask_bad(batch: Batch, log: _Corrupt) -> Batch:
    """Masks the rows that did not decode; see `replace_bad`."""
    bad, names = batch.pop("bad"), batch.pop("name")
    if bad.any():
        log.report(names[bad], "it is not evaluated")
        batch = {**batch, "label": np.where(bad, 0, batch["label"]).astype(np.int32)}
        batch["mask"] = np.where(bad, 0.0, batch["mask"]).astype(np.float32)
    return batch


def _guarded(tf: Any, decode: Callable[..., Any], shape: tuple[int, ...]) -> Callable[..., tuple[Any, Any]]:
    """`decode`, but returning (image, did it fail) instead of raising inside the graph.

    Its graph is set up anew for each image, so it is to be small.
    """
    black = tf.data.Dataset.from_tensors((tf.zeros(shape, tf.uint8), True))

    def run(*arguments: Any) -> tuple[Any, Any]:
        @tf.autograph.experimental.do_not_convert
        def good(*arguments: Any) -> tuple[Any, Any]:
            return decode(*arguments), False

        made = tf.data.Dataset.from_tensors(arguments).map(good).ignore_errors()
        return made.concatenate(black).take(1).get_single_element()

    return run


def _check_streamable(info: DataInfo, options: AugmentOptions) -> None:
    if options.crop == "pad":
        raise DataError(
            f"augment.crop='pad' is for small sets in memory and {info.name!r} is streamed: "
            "use 'random_resized' or 'none'"
        )


def _local_shards(plan: TrainPlan | EvalPlan) -> range:
    index, processes = plan.process
    return range(index * plan.shards // processes, (index + 1) * plan.shards // processes)


def _in_turn(tf: Any, streams: list[Any], block: int) -> Any:
    """`block` elements of each stream in turn."""
    if len(streams) == 1:
        return streams[0]
    turns = tf.data.Dataset.range(len(streams)).repeat()
    turns = turns.flat_map(lambda i: tf.data.Dataset.from_tensors(i).repeat(block))
    return tf.data.Dataset.choose_from_datasets(streams, turns, stop_on_empty_dataset=True)


def _batches(tf: Any, records: Any, example: Any, batch: int, steps: int) -> Iterator[Batch]:
    """Decodes in parallel, in order; yields `steps` numpy batches."""
    example = tf.autograph.experimental.do_not_convert(example)
    rows = records.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    rows = rows.batch(batch, drop_remainder=True).take(steps).prefetch(2)
    return rows.as_numpy_iterator()
