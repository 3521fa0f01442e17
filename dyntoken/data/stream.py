"""Sets too big for memory through tf.data: records are shuffled and skipped undecoded.

Virtual shard s of S reads a fixed range of the split, in an order drawn from
(seed, epoch, s); a batch takes `batch / S` records of each shard in turn. Only
what a batch needs is decoded, and JPEGs only where the crop lies.

With repeated augmentation a shard reads four records at a time and shows each of
them `repeats` times in turn: a b c d, b c d a, c d a b. So an image is read and
decoded once for all its views, whatever the number of processes, and
neighbouring rows, which mixup pairs, are never of the same image.

An image that cannot be read, does not decode or is too large is counted and named,
and changes no other row: in training the row before it in its shard's part of the
batch (the last, for the first) takes its place, in evaluation it is masked. That
depends on the batch alone, so a resumed run and any number of processes see the
same. Catching such an image takes TensorFlow as long as decoding it. So images are
decoded unguarded until the first one fails, and guarded, from the same batch, ever after.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from dyntoken.data import hash_rng
from dyntoken.data.augment import AugmentOptions
from dyntoken.data.closing import close_at_exit
from dyntoken.data.errors import DataError
from dyntoken.data.in_memory import Batch
from dyntoken.data.info import DataInfo, check_labels
from dyntoken.data.requests import EvalRequest, TrainRequest
from dyntoken.data.splits import Part, slice_parts
from dyntoken.data.tf_image import compiled_eval, compiled_train
from dyntoken.data.tf_import import tensorflow

MAX_CORRUPT = 50  # images, before a run gives up
_FILES, _RECORDS, _AUGMENT = 3, 4, 5  # names of the draws
_SHARD_BITS = 40  # a record's number is shard << 40 | position in the shard's epoch
_GROUP = 4  # records whose views take turns
_log = logging.getLogger(__name__)


class Records(Protocol):
    """Encoded images on disk.

    `rows(parts, key)` is a tf.data.Dataset of (pointer, int32 label, name) or
    (pointer, int32 label, name, bool `[K]`: every label that fits), in stored
    order or, given a key, in an order drawn from it; `load(pointer)`, a static
    method, gives the encoded image; `buffer` is the size of the shuffle buffer that
    the drawn order still wants, 0 for none; `where` says in an error what is read.
    The stored order has to be a random one, else slices and shards hold some classes only.
    `why(name, channels)`: why an image does not decode, or "".

    Where labels are known beforehand, `balanced(parts, start, stop, key)` is what `rows`
    is, but of rows `start .. stop - 1` of an epoch that has all classes equally often.
    """

    buffer: int
    where: str

    def rows(self, parts: Sequence[Part], key: tuple[int, ...] | None) -> Any: ...

    def load(self, pointer: Any) -> Any: ...

    def why(self, name: bytes, channels: int) -> str: ...


def _int63(*parts: int) -> int:
    return int(hash_rng.bits(*parts)[0] >> np.uint64(1))


class StreamSource:
    """A `Source` over records."""

    def __init__(self, records: Records, info: DataInfo, max_corrupt: int = MAX_CORRUPT):
        """Args: records; info; max_corrupt: images that may fail to decode before an iterator raises."""
        self.info = info
        self._records = records
        self._max_corrupt = max_corrupt

    def _shard(self, plan: TrainRequest, epoch: int, shard: int) -> Any:
        """(number, row) of one data shard in the order of an epoch."""
        rows = plan.shard(shard)
        bounds = rows.start, rows.stop
        if plan.balance:
            records = self._records.balanced(plan.parts, *bounds, (plan.seed, epoch, _FILES))
            return records.enumerate(shard << _SHARD_BITS)
        records = self._records.rows(slice_parts(plan.parts, *bounds), (plan.seed, epoch, _FILES, shard))
        if self._records.buffer:
            seed = _int63(plan.seed, epoch, _RECORDS, shard)
            records = records.shuffle(self._records.buffer, seed=seed, reshuffle_each_iteration=False)
        return records.enumerate(shard << _SHARD_BITS)

    def _example(self, plan: TrainRequest, epoch: int, guarded: bool) -> Callable[..., dict[str, Any]]:
        """(number, row) -> the views of a record, uint8 `[repeats, h, w, C]`, and what goes with them."""
        tf = tensorflow()
        key, distortion = _int63(plan.seed, epoch, _AUGMENT), plan.augment.distortion(self.info.mean)
        load = self._records.load
        make = compiled_train(plan.size, self.info.channels, plan.augment, distortion, guarded, load)

        def example(number: Any, row: Any) -> dict[str, Any]:
            views, bad = make(row[0], tf.stack([key, number]))
            return {"image": views, "label": row[1], "mask": 1.0, "bad": bad, "name": row[2]}

        return example

    def _epoch(self, plan: TrainRequest, epoch: int, skip: int, guarded: bool) -> Iterator[Batch]:
        """The batches of one epoch from batch `skip` on, with `bad` and `name`."""
        tf = tensorflow()
        per_shard, steps = plan.batch // plan.shards, plan.steps_per_epoch - skip
        example, shards = self._example(plan, epoch, guarded), plan.local_shards
        if plan.augment.repeats == 1:

            def only(number: Any, row: Any) -> dict[str, Any]:
                made = example(number, row)
                return {**made, "image": made["image"][0]}

            streams = [self._shard(plan, epoch, s).skip(skip * per_shard) for s in shards]
            yield from _batches(tf, _in_turn(tf, streams, per_shard), only, per_shard * len(streams), steps)
            return
        order = view_order(min(_GROUP, plan.count // plan.shards), plan.augment.repeats)
        records = 1 + max(record for record, _ in order)
        groups, first = divmod(skip * per_shard, len(order))
        streams = [self._shard(plan, epoch, s).skip(groups * records) for s in shards]
        rows = _mapped(tf, _in_turn(tf, streams, records), example)
        made = rows.batch(records).prefetch(len(streams)).as_numpy_iterator()
        queues: list[list[tuple[Batch, int, int]]] = [[] for _ in streams]
        for _ in range(steps):
            while len(queues[-1]) < first + per_shard:
                for queue in queues:
                    group = next(made)
                    queue.extend((group, record, view) for record, view in order)
            yield _stacked([row for queue in queues for row in queue[first : first + per_shard]])
            for queue in queues:
                del queue[: first + per_shard]
            first = 0

    def train(self, plan: TrainRequest) -> Iterator[Batch]:
        _check_streamable(self.info, plan.augment)
        if plan.balance and not hasattr(self._records, "balanced"):
            raise DataError(
                f"data.balance needs labels that are known beforehand, and data set {self.info.name!r} is "
                "streamed: switch it off, or use a folder of images"
            )
        plan.augment.distortion(self.info.mean)
        per_shard = plan.batch // plan.shards

        def batches(step: int, guarded: bool) -> Iterator[Batch]:
            while True:
                epoch, skip = divmod(step, plan.steps_per_epoch)
                yield from self._epoch(plan, epoch, skip, guarded)
                step = (epoch + 1) * plan.steps_per_epoch

        made = self._guarded(batches, plan.start_step, lambda batch, log: replace_bad(batch, per_shard, log))
        return close_at_exit(made)

    def evaluate(self, plan: EvalRequest) -> Iterator[Batch]:
        return close_at_exit(
            self._guarded(lambda step, guarded: self._pass(plan, step, guarded), 0, mask_bad)
        )

    def _guarded(
        self,
        batches: Callable[[int, bool], Iterator[Batch]],
        step: int,
        mend: Callable[[Batch, _Corrupt], Batch],
    ) -> Iterator[Batch]:
        """The batches from a step on, `batches(step, guarded)`: unguarded until an image fails."""
        # Not looked up later: an iterator may be closed when the modules are gone.
        failure, guarded = tensorflow().errors.OpError, False
        log = _Corrupt(self.info, self._max_corrupt, self._records)
        while True:
            try:
                for batch in batches(step, guarded):
                    yield mend(batch, log)
                    step += 1
                return
            except failure as error:
                if guarded:
                    raise unreadable(self.info.name, error, self._records.where) from None
                guarded = True

    def _pass(self, plan: EvalRequest, skip: int, guarded: bool) -> Iterator[Batch]:
        """The batches of one evaluation from batch `skip` on, with `bad` and `name`."""
        tf = tensorflow()
        per_shard, streams = plan.batch // plan.shards, []
        for shard in plan.local_shards:
            rows = slice_parts(plan.parts, plan.shard(shard).start, plan.shard(shard).stop)
            rows = self._records.rows(rows, None).map(lambda *row: (row, 1.0))
            padding = rows.element_spec[0]
            empty = tuple(tf.zeros(spec.shape, spec.dtype) for spec in padding)
            rows = rows.concatenate(tf.data.Dataset.from_tensors((empty, 0.0)).repeat())
            streams.append(rows.take(plan.steps * per_shard).skip(skip * per_shard))
        shape = (*plan.size, self.info.channels)
        load = self._records.load
        decode = compiled_eval(plan.size, shape[-1], plan.crop_pct, plan.interpolation, guarded, load)

        def example(row: Any, mask: Any) -> dict[str, Any]:
            image, bad = tf.cond(
                mask > 0.0,
                lambda: decode(row[0]),
                lambda: (tf.zeros(shape, tf.uint8), False),
            )
            out = {"image": image, "label": row[1], "mask": mask, "bad": bad, "name": row[2]}
            if len(row) > 3:  # what no label fits is not evaluated
                out |= {"labels": row[3], "mask": mask * tf.cast(tf.reduce_any(row[3]), tf.float32)}
            return out

        return _batches(
            tf, _in_turn(tf, streams, per_shard), example, per_shard * len(streams), plan.steps - skip
        )


def view_order(records: int, repeats: int) -> list[tuple[int, int]]:
    """(record, view) of each row of a group, neighbours never of the same record (from 2 records on)."""
    turn = 1 if records > 2 else 0
    return [((i + view * turn) % records, view) for view in range(repeats) for i in range(records)]


def _stacked(rows: Sequence[tuple[Batch, int, int]]) -> Batch:
    """A batch of (views of some records, which record, which view)."""
    keys = [key for key in rows[0][0] if key != "image"]
    batch = {key: np.array([group[key][record] for group, record, _ in rows]) for key in keys}
    return {"image": np.stack([group["image"][record, view] for group, record, view in rows]), **batch}


def unreadable(name: str, error: Exception, where: str) -> DataError:
    """The error for a set whose records TensorFlow cannot read, without its graph's names."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error))
    return DataError(f"data set {name!r} cannot be read ({' '.join(text.split())}): {where}")


def spell(name: bytes) -> str:
    """A file's name in one printable line, whatever bytes it is made of."""
    text = name.decode(errors="surrogateescape")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Corrupt:
    """Names and counts images that do not decode."""

    def __init__(self, info: DataInfo, limit: int, records: Records):
        self.info, self._limit, self._records, self._seen = info, limit, records, set()

    def report(self, names: Sequence[bytes], instead: str) -> None:
        for name in names:
            if name in self._seen:
                continue
            self._seen.add(name)
            count, why = len(self._seen), self._records.why(name, self.info.channels)
            because = f" [{why}]" if why else ""
            if count > self._limit:
                raise DataError(
                    f"image {spell(name)} of data set {self.info.name!r} does not decode, the {count}th: more than "
                    f"max_corrupt={self._limit}; repair the set, or raise data.options.max_corrupt{because}"
                )
            _log.warning("image %s does not decode (%d so far): %s%s", spell(name), count, instead, because)

    def check(self, batch: Batch, good: np.ndarray, names: np.ndarray) -> None:
        """Refuses labels outside the classes, of rows that are good."""
        check_labels(batch["label"][good], lambda row: spell(names[good][row]), self.info)


def replace_bad(batch: Batch, per_shard: int, log: _Corrupt) -> Batch:
    """Fills each row that did not decode with the good one before it in its shard.

    Where a shard has no good row, nothing is learnt from its rows: their mask is 0. They
    hold what is mixed with, if anything is: the other image of their pair.

    Args:
      batch: with `bad` bool `[b]` and `name` bytes `[b]`, which are taken out.
      per_shard: rows of each virtual shard.
      log: told the names.

    Raises:
      DataError: the log's limit is reached, or a label is none of the classes.
    """
    bad, names = batch.pop("bad"), batch.pop("name")
    log.check(batch, ~bad, names)
    if not bad.any():
        return batch
    log.report(names[bad], "another image of the batch takes its place")
    source, lost = np.arange(len(bad)), np.zeros(len(bad), bool)
    for row in np.flatnonzero(bad):
        first = row // per_shard * per_shard
        ring = first + (row - first - 1 - np.arange(per_shard - 1)) % per_shard
        good = ring[~bad[ring]]
        if len(good):
            source[row] = good[0]
        else:
            lost[row] = True
    partner = np.minimum(np.flatnonzero(lost) ^ 1, len(bad) - 1)
    source[lost] = source[partner]
    batch = {key: value[source] for key, value in batch.items()}
    batch["mask"] = np.where(lost, 0.0, batch["mask"]).astype(np.float32)
    batch["label"] = np.where(lost & bad[source], 0, batch["label"]).astype(np.int32)
    return batch


def mask_bad(batch: Batch, log: _Corrupt) -> Batch:
    """Masks the rows that did not decode; see `replace_bad`."""
    bad, names = batch.pop("bad"), batch.pop("name")
    log.check(batch, ~bad & (batch["mask"] > 0), names)
    if bad.any():
        log.report(names[bad], "it is not evaluated")
        batch = {**batch, "label": np.where(bad, 0, batch["label"]).astype(np.int32)}
        batch["mask"] = np.where(bad, 0.0, batch["mask"]).astype(np.float32)
    return batch


def _check_streamable(info: DataInfo, options: AugmentOptions) -> None:
    if options.crop == "pad":
        raise DataError(
            f"augment.crop='pad' is for small sets in memory and {info.name!r} is streamed: "
            "use 'random_resized' or 'none'"
        )


def _in_turn(tf: Any, streams: list[Any], block: int) -> Any:
    """`block` elements of each stream in turn."""
    if len(streams) == 1:
        return streams[0]
    turns = tf.data.Dataset.range(len(streams)).repeat()
    turns = turns.flat_map(lambda i: tf.data.Dataset.from_tensors(i).repeat(block))
    return tf.data.Dataset.choose_from_datasets(streams, turns, stop_on_empty_dataset=True)


def _batches(tf: Any, records: Any, example: Any, batch: int, steps: int) -> Iterator[Batch]:
    """Decodes in parallel, in order; yields `steps` numpy batches."""
    rows = _mapped(tf, records, example).batch(batch, drop_remainder=True)
    return rows.take(steps).prefetch(2).as_numpy_iterator()


def _mapped(tf: Any, records: Any, example: Any) -> Any:
    example = tf.autograph.experimental.do_not_convert(example)
    options = tf.data.Options()
    options.threading.max_intra_op_parallelism = 1  # images keep the cores busy, not parts of one
    rows = records.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return rows.with_options(options)
