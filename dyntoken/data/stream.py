"""Encoded images through tf.data: only what a batch needs is decoded, and JPEGs only where the crop lies.

Virtual shard s of S holds a fixed range of the split, in an order drawn from
(seed, epoch, s); a batch takes `batch / S` records of each shard in turn.

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

import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dyntoken.data import hash_rng
from dyntoken.data.errors import DataError
from dyntoken.data.info import DataInfo, check_labels
from dyntoken.data.prefetching import close_at_exit
from dyntoken.data.requests import EvalRequest, TrainRequest
from dyntoken.data.sources import Batch
from dyntoken.data.tf_image import compiled, eval_view, train_views
from dyntoken.data.tf_import import tf

MAX_CORRUPT = 50  # images, before a run gives up
FILE_ORDER, RECORD_ORDER, _AUGMENT = 3, 4, 5  # names of the draws
SHARD_BITS = 40  # a record's number is shard << 40 | position in the shard's epoch
_GROUP = 4  # records whose views take turns
_log = logging.getLogger(__name__)


class Records:
    """Encoded images on disk, as tf.data.Datasets of rows.

    A row is (pointer, int32 label, name) or (pointer, int32 label, name, bool `[K]`: every
    label that fits); `load(pointer)` gives the encoded image.

    The stored order has to be a random one, else slices and shards hold some classes only.

    Attributes:
      where: says in an error what is read.
      labels_known: without reading, so that `request.balance` can be served.
    """

    where = ""
    labels_known = False

    def train(self, request: TrainRequest, epoch: int, block: int, skip: int) -> Any:
        """(number, row) of this process's shards in an epoch's order, `block` of each in turn, from block `skip` on."""
        raise NotImplementedError

    def evaluate(self, request: EvalRequest, skip: int) -> Any:
        """(row, mask) of this process's shards in stored order, padded with mask 0, from batch `skip` on."""
        raise NotImplementedError

    @staticmethod
    def load(pointer: Any) -> Any:
        return pointer

    def why(self, name: bytes, channels: int) -> str:
        """Why an image does not decode, or ""."""
        return ""


class StreamSource:
    """A `Source` over records."""

    def __init__(self, records: Records, info: DataInfo, max_corrupt: int = MAX_CORRUPT):
        """Args: records; info; max_corrupt: images that may fail to decode before an iterator raises."""
        self.info = info
        self._records = records
        self._max_corrupt = max_corrupt

    def train(self, request: TrainRequest) -> Iterator[Batch]:
        if request.augment.crop == "pad":
            raise DataError(
                f"augment.crop='pad' is for small sets in memory and {self.info.name!r} is streamed: "
                "use 'random_resized' or 'none'"
            )
        if request.balance and not self._records.labels_known:
            raise DataError(
                f"data.balance needs labels that are known beforehand, and data set {self.info.name!r} is "
                "streamed: switch it off, or use a folder of images"
            )
        request.augment.distortion(self.info.mean)

        def batches(step: int, guarded: bool) -> Iterator[Batch]:
            while True:
                epoch, skip = divmod(step, request.steps_per_epoch)
                yield from self._epoch(request, epoch, skip, guarded)
                step = (epoch + 1) * request.steps_per_epoch

        return close_at_exit(
            self._guarded(
                batches, request.start_step, lambda batch, log: replace_bad(batch, request.per_shard, log)
            )
        )

    def evaluate(self, request: EvalRequest) -> Iterator[Batch]:
        mend = functools.partial(mask_bad, named=request.named)
        return close_at_exit(self._guarded(functools.partial(self._pass, request), 0, mend))

    def _guarded(
        self,
        batches: Callable[[int, bool], Iterator[Batch]],
        step: int,
        mend: Callable[[Batch, CorruptLog], Batch],
    ) -> Iterator[Batch]:
        """The batches from a step on, `batches(step, guarded)`: unguarded until an image fails."""
        # Not looked up later: an iterator may be closed when the modules are gone.
        failure, guarded = tf.errors.OpError, False
        log = CorruptLog(self.info, self._max_corrupt, self._records)
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

    def _epoch(self, request: TrainRequest, epoch: int, skip: int, guarded: bool) -> Iterator[Batch]:
        """The batches of one epoch from batch `skip` on, with `bad` and `name`."""
        per_shard, steps, repeats = request.per_shard, request.steps_per_epoch - skip, request.augment.repeats
        key = hash_rng.int63(request.seed, epoch, _AUGMENT)
        distortion = request.augment.distortion(self.info.mean)
        how = request.size, self.info.channels, request.augment, distortion, guarded
        views_of = compiled(train_views, self._records.load, *how)

        def example(number: Any, row: Any) -> dict[str, Any]:
            views, bad = views_of(row[0], tf.stack([key, number]))
            image = views[0] if repeats == 1 else views
            return {"image": image, "label": row[1], "mask": 1.0, "bad": bad, "name": row[2]}

        if repeats == 1:
            rows = _mapped(self._records.train(request, epoch, per_shard, skip), example)
            yield from _batches(rows, len(request.local_rows), steps)
            return
        order = interleaved_views(min(_GROUP, request.count // request.shards), repeats)
        records = 1 + max(record for record, _ in order)
        groups, first = divmod(skip * per_shard, len(order))
        rows = _mapped(self._records.train(request, epoch, records, groups), example)
        queues: list[list[tuple[Batch, int, int]]] = [[] for _ in request.local_shards]
        made = rows.batch(records).prefetch(len(queues)).as_numpy_iterator()
        for _ in range(steps):
            while len(queues[-1]) < first + per_shard:
                for queue in queues:
                    group = next(made)
                    queue.extend((group, record, view) for record, view in order)
            yield _stacked([row for queue in queues for row in queue[first : first + per_shard]])
            for queue in queues:
                del queue[: first + per_shard]
            first = 0

    def _pass(self, request: EvalRequest, skip: int, guarded: bool) -> Iterator[Batch]:
        """The batches of one evaluation from batch `skip` on, with `bad` and `name`."""
        shape = (*request.size, self.info.channels)
        how = request.size, self.info.channels, request.crop_pct, request.interpolation, guarded
        view_of = compiled(eval_view, self._records.load, *how)

        def example(row: Any, mask: Any) -> dict[str, Any]:
            image, bad = tf.cond(
                mask > 0.0, lambda: view_of(row[0]), lambda: (tf.zeros(shape, tf.uint8), False)
            )
            out = {"image": image, "label": row[1], "mask": mask, "bad": bad, "name": row[2]}
            if len(row) > 3:  # what no label fits is not evaluated
                out |= {"labels": row[3], "mask": mask * tf.cast(tf.reduce_any(row[3]), tf.float32)}
            return out

        rows = _mapped(self._records.evaluate(request, skip), example)
        return _batches(rows, len(request.local_rows), request.steps - skip)


def _mapped(records: Any, example: Callable[..., dict[str, Any]]) -> Any:
    """Decodes in parallel, in order."""
    example = tf.autograph.experimental.do_not_convert(example)
    options = tf.data.Options()
    options.threading.max_intra_op_parallelism = 1  # images keep the cores busy, not parts of one
    rows = records.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return rows.with_options(options)


def _batches(rows: Any, batch: int, steps: int) -> Iterator[Batch]:
    return rows.batch(batch, drop_remainder=True).take(steps).prefetch(2).as_numpy_iterator()


def interleaved_views(records: int, repeats: int) -> list[tuple[int, int]]:
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


class CorruptLog:
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


def replace_bad(batch: Batch, per_shard: int, log: CorruptLog) -> Batch:
    """Fills each row that did not decode with the good one before it in its shard.

    Where a shard has no good row, nothing is learnt from its rows: their mask is 0. They
    hold what is mixed with, if anything is: the other image of their pair.

    `bad` bool `[b]` and `name` bytes `[b]` are taken out of the batch.
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


def mask_bad(batch: Batch, log: CorruptLog, *, named: bool = False) -> Batch:
    """Masks the rows that did not decode; see `replace_bad`. `named` leaves the names in."""
    bad, names = batch.pop("bad"), batch.pop("name")
    log.check(batch, ~bad & (batch["mask"] > 0), names)
    if bad.any():
        log.report(names[bad], "it is not evaluated")
        batch = {**batch, "label": np.where(bad, 0, batch["label"]).astype(np.int32)}
        batch["mask"] = np.where(bad, 0.0, batch["mask"]).astype(np.float32)
    return {**batch, "name": names} if named else batch
