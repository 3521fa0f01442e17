"""Big TFDS sets through tf.data: records are shuffled and skipped undecoded.

Virtual shard s of S reads a fixed range of the split. Each epoch its files are
put in an order drawn from (seed, epoch, s) and pass a shuffle buffer; a batch
takes `batch / S` records of each shard in turn. Only what a batch needs is
decoded, and JPEGs only where the crop lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dyntoken.data import stateless
from dyntoken.data.arrays import Batch
from dyntoken.data.augment import AugmentOptions
from dyntoken.data.errors import DataError
from dyntoken.data.plan import DataInfo, EvalPlan, Part, TrainPlan, slice_parts
from dyntoken.data.tf_image import eval_image, train_image
from dyntoken.data.tf_import import tensorflow
from dyntoken.data.tfds_source import features_of

SHUFFLE_BUFFER = 2048  # records per virtual shard
_CYCLE, _BLOCK = 4, 16  # files read in turn, records at a time
_FILES, _RECORDS, _AUGMENT = 3, 4, 5  # names of the draws
_SHARD_BITS = 40  # an example's number is shard << 40 | position in the shard's epoch


def _int63(*parts: int) -> int:
    return int(stateless.bits(*parts)[0] >> np.uint64(1))


def shard_range(count: int, shards: int, shard: int) -> tuple[int, int]:
    """First row and one past the last row of a virtual shard."""
    return shard * count // shards, (shard + 1) * count // shards


class StreamSource:
    """A `Source` over a prepared TFDS builder."""

    def __init__(self, builder: Any, info: DataInfo):
        self.info = info
        self._builder = builder
        self._image, self._label = features_of(builder)

    def _records(self, parts: Sequence[Part], order_key: tuple[int, ...] | None) -> Any:
        """Dataset of (encoded image, int32 label); files in a drawn order if keyed."""
        import tensorflow_datasets as tfds

        tf = tensorflow()

        def reorder(files: list[Any]) -> list[Any]:
            return [files[i] for i in stateless.permutation(len(files), *order_key)]

        if not parts:
            return tf.data.Dataset.from_tensors((b"", np.int32(0))).take(0)
        config = tfds.ReadConfig(
            try_autocache=False,
            interleave_cycle_length=_CYCLE,
            interleave_block_length=_BLOCK,
            enable_ordering_guard=False,
            skip_prefetch=True,
            experimental_interleave_sort_fn=reorder if order_key is not None else None,
        )
        keys = {self._image: True, self._label: True}
        instruction = None
        for name, start, stop in parts:
            one = tfds.core.ReadInstruction(name, from_=start, to=stop, unit="abs")
            instruction = one if instruction is None else instruction + one
        records = self._builder.as_dataset(
            split=instruction,
            read_config=config,
            decoders=tfds.decode.PartialDecoding(keys, decoders={self._image: tfds.decode.SkipDecoding()}),
            shuffle_files=False,
        )

        @tf.autograph.experimental.do_not_convert
        def pair(row: Any) -> tuple[Any, Any]:
            return row[self._image], tf.cast(row[self._label], tf.int32)

        return records.map(pair)

    def _epoch(self, plan: TrainPlan, epoch: int, skip: int) -> Iterator[Batch]:
        """The batches of one epoch from batch `skip` on."""
        tf = tensorflow()
        per_shard, steps = plan.batch // plan.shards, plan.steps_per_epoch
        streams = []
        for shard in _local_shards(plan):
            rows = slice_parts(plan.parts, *shard_range(plan.count, plan.shards, shard))
            records = self._records(rows, (plan.seed, epoch, _FILES, shard))
            seed = _int63(plan.seed, epoch, _RECORDS, shard)
            records = records.shuffle(SHUFFLE_BUFFER, seed=seed, reshuffle_each_iteration=False)
            records = records.take(steps * per_shard).enumerate(shard << _SHARD_BITS)
            streams.append(records.skip(skip * per_shard))
        local, key = per_shard * len(streams), _int63(plan.seed, epoch, _AUGMENT)
        channels, options = self.info.channels, plan.augment

        def example(number: Any, row: Any) -> dict[str, Any]:
            image = train_image(row[0], tf.stack([key, number]), plan.size, channels, options)
            return {"image": image, "label": row[1], "mask": 1.0}

        return _batches(tf, _in_turn(tf, streams, per_shard), example, local, steps - skip)

    def train(self, plan: TrainPlan) -> Iterator[Batch]:
        _check_streamable(self.info, plan.augment)

        def run() -> Iterator[Batch]:
            epoch, skip = divmod(plan.start_step, plan.steps_per_epoch)
            while True:
                yield from self._epoch(plan, epoch, skip)
                epoch, skip = epoch + 1, 0

        return run()

    def evaluate(self, plan: EvalPlan) -> Iterator[Batch]:
        tf = tensorflow()
        per_shard, streams = plan.batch // plan.shards, []
        for shard in _local_shards(plan):
            rows = slice_parts(plan.parts, *shard_range(plan.count, plan.shards, shard))
            records = self._records(rows, None).map(lambda image, label: (image, label, 1.0))
            padding = tf.data.Dataset.from_tensors((b"", 0, 0.0)).repeat()
            streams.append(records.concatenate(padding).take(plan.steps * per_shard))
        channels = self.info.channels

        def example(data: Any, label: Any, mask: Any) -> dict[str, Any]:
            image = tf.cond(
                mask > 0.0,
                lambda: eval_image(data, plan.size, channels, plan.crop_pct, plan.interpolation),
                lambda: tf.zeros((*plan.size, channels), tf.uint8),
            )
            return {"image": image, "label": label, "mask": mask}

        return _batches(tf, _in_turn(tf, streams, per_shard), example, per_shard * len(streams), plan.steps)


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
