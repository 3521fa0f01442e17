"""TFDS data sets that are already on disk; nothing is ever downloaded.

The folder is found by its name and read by `tfds.builder_from_directory`,
which needs no generation code and has no way to fetch anything. Small sets of
one image size are decoded once into memory and batched by numpy; the others
are streamed by tf.data (`stream`): their records may lie on remote storage, where
reading each for itself takes long.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dyntoken.data import hash_rng, stream
from dyntoken.data.errors import DataError, MissingDataError
from dyntoken.data.in_memory import ArrayRows, ArraySource
from dyntoken.data.info import DataInfo
from dyntoken.data.known_datasets import KNOWN_DATASETS, default_moments
from dyntoken.data.requests import EvalRequest, TrainRequest
from dyntoken.data.sources import SOURCES, Batch
from dyntoken.data.splits import Part
from dyntoken.data.stream import MAX_CORRUPT, Records, StreamSource, unreadable
from dyntoken.data.tf_import import INSTALL, tensorflow, tf, tfds
from dyntoken.registry import UnknownNameError, suggest
from dyntoken.schema import Natural

SHUFFLE_BUFFER = 2048  # records per virtual shard
IN_MEMORY_BYTES = 512 * 2**20  # decoded, all splits together
_ENDS = 64  # examples at either end of a split, by which one sees that it is sorted
_CYCLE, _BLOCK = 4, 16  # files read in turn, records at a time
_REAL_LABEL = "real_label"  # of imagenet2012_real: every label that fits, or none
_NAME = re.compile(r"^\w+(/[\w.+-]+)?(:[\d.*]+)?$")
_VERSION = re.compile(r"^\d+\.\d+\.\d+$")
_BUILD = "run `tfds build {name} --data_dir={data_dir}`"
_TARS = "put {} (from image-net.org) into {{data_dir}}/downloads/manual and run `tfds build {} --data_dir={{data_dir}}`"
# How a set gets onto the disk, where `_BUILD` is not all; a version may follow the name.
_HOW = {
    "imagenet2012": _TARS.format("ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar", "imagenet2012"),
    "imagenet2012_real": _TARS.format("ILSVRC2012_img_val.tar", "imagenet2012_real"),
    "fashion_mnist": (
        "run `tfds build fashion_mnist --data_dir={data_dir}`, or in a clone of dyntoken, from the idx files (apt "
        "install dataset-fashion-mnist), `python scripts/prepare_data.py fashion_mnist "
        "--source=/usr/share/datasets/fashion-mnist --data_dir={data_dir}`"
    ),
    "i_naturalist2019": (
        "run, in a clone of dyntoken, `python scripts/prepare_data.py inat2019 --source=DIR --data_dir={data_dir}` "
        "(DIR holds train2019.json, val2019.json and the unpacked train_val2019.tar.gz of "
        "github.com/visipedia/inat_comp)"
    ),
}


def default_data_dir() -> str:
    """Where TFDS keeps data: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    return os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")


def _versions(folder: Any) -> list[Any]:
    """The prepared version folders under a path, oldest first."""
    if not folder.is_dir():
        return []
    found = [f for f in folder.iterdir() if _VERSION.match(f.name) and (f / "dataset_info.json").exists()]
    return sorted(found, key=lambda f: tuple(map(int, f.name.split("."))))


def _find(name: str, data_dir: str) -> Any | None:
    """The folder of `name[/config][:version]` under `data_dir`, or None.

    Without a version the newest; without a config the only one, else it is an error.
    """
    from etils import epath

    path, _, version = name.partition(":")
    root = epath.Path(data_dir).expanduser() / path
    candidates = _versions(root)
    if not candidates and root.is_dir():
        configs = {f.name: _versions(f) for f in root.iterdir() if f.is_dir()}
        configs = {config: versions for config, versions in configs.items() if versions}
        if len(configs) > 1:
            known = ", ".join(f"{path}/{config}" for config in sorted(configs))
            raise DataError(f"{data_dir} holds several configs of {path!r}; name one of {known}")
        candidates = next(iter(configs.values()), [])
    if version:
        pattern = re.compile("^" + re.escape(version).replace(r"\*", r"\d+") + "$")
        candidates = [f for f in candidates if pattern.match(f.name)]
    return candidates[-1] if candidates else None


def _absent(name: str, data_dir: str) -> Exception:
    """The error for a set that is not on disk: how to get it, or its nearest names."""
    base = re.split("[:/]", name)[0]
    if base not in _HOW:
        known = list(SOURCES)
        if importlib.util.find_spec("tensorflow_datasets") is not None:
            known += tfds.list_builders(with_community_datasets=False)  # no TensorFlow, no network
        if base not in known:
            return UnknownNameError(
                f"unknown data set {name!r}, and not in {data_dir}: {suggest(base, known)}"
            )
    config = "imagenet_v2/matched-frequency" if name == "imagenet_v2" else name
    how = _HOW.get(base, _BUILD).format(name=config, data_dir=data_dir)
    need = "" if importlib.util.find_spec("tensorflow") else f" ({INSTALL})"
    return MissingDataError(
        f"data set {name!r} is not in data_dir {data_dir}: {how}, or give another data_dir{need}"
    )


def features_of(builder: Any) -> tuple[str, str]:
    """Names of the 8-bit image and the class label of a set's examples."""
    found = {}
    for kind, cls in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        keys = [key for key, feature in builder.info.features.items() if isinstance(feature, cls)]
        if not keys:
            raise DataError(
                f"TFDS set {builder.info.full_name!r} has no {kind}: it is no image classification set"
            )
        found[kind] = kind if kind in keys else keys[0]
    if builder.info.features[found["image"]].np_dtype != np.uint8:
        raise DataError(f"TFDS set {builder.info.full_name!r} has no 8-bit images")
    return found["image"], found["label"]


def _describe(name: str, builder: Any) -> DataInfo:
    image, label = features_of(builder)
    shape = builder.info.features[image].shape
    channels = shape[-1] or 3
    labels = builder.info.features[label]
    names = tuple(labels.names) if labels.names and not labels.names[0].isdigit() else ()
    mean, std = default_moments(builder.info.name, channels)
    return DataInfo(
        name=name,
        num_classes=labels.num_classes,
        image_shape=None if None in shape else tuple(shape),
        splits={key: split.num_examples for key, split in builder.info.splits.items()},
        mean=mean,
        std=std,
        class_names=names,
        several_labels=_REAL_LABEL in builder.info.features,
    )


@functools.lru_cache(maxsize=8)
def _read(name: str, path: str) -> tuple[Any, DataInfo]:
    """The builder of a prepared folder and its description."""
    tensorflow()
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:  # whatever TFDS stumbles over in its own JSON
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"data set {name!r}: dataset_info.json or features.json in {path} is damaged ({text}): {_again(path)}"
        ) from None
    return builder, _describe(name, builder)


def _again(path: str) -> str:
    return f"copy or build {path} again"


@functools.lru_cache(maxsize=8)
def _decoded(name: str, path: str, split: str) -> ArrayRows:
    """A whole split as arrays, in the order of its files unless that is one of classes."""
    builder, _ = _read(name, path)
    image, label = features_of(builder)
    config = tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1, enable_ordering_guard=False)
    try:
        dataset = builder.as_dataset(
            split=split,
            batch_size=-1,
            read_config=config,
            decoders=tfds.decode.PartialDecoding({image: True, label: True}),
            shuffle_files=False,
        )
        arrays = tfds.as_numpy(dataset)
    except tf.errors.OpError as error:
        raise unreadable(name, error, _again(path)) from None
    rows = ArrayRows(np.ascontiguousarray(arrays[image]), arrays[label].astype(np.int32))
    in_order = builder.info.disable_shuffling or (np.diff(rows.labels) >= 0).all()
    return rows.stratified() if in_order else rows


class TfdsRecords(Records):
    """Records of a prepared builder: a shard's files are read in turn, shuffled in a buffer."""

    def __init__(self, builder: Any):
        self._builder = builder
        self.where = _again(os.fspath(builder.data_path))
        self._image, self._label = features_of(builder)
        self._several = _REAL_LABEL if _REAL_LABEL in builder.info.features else None
        self._classes = builder.info.features[self._label].num_classes

    def train(self, request: TrainRequest, epoch: int, block: int, skip: int) -> Any:
        def read(shard: int) -> Any:
            key = request.seed, epoch
            records = self.read(request.shard_parts(shard), (*key, stream.FILE_ORDER, shard))
            seed = hash_rng.int63(*key, stream.RECORD_ORDER, shard)
            records = records.shuffle(SHUFFLE_BUFFER, seed=seed, reshuffle_each_iteration=False)
            return records.enumerate(shard << stream.SHARD_BITS).skip(skip * block)

        return _in_turn([read(shard) for shard in request.local_shards], block)

    def evaluate(self, request: EvalRequest, skip: int) -> Any:
        def read(shard: int) -> Any:
            records = self.read(request.shard_parts(shard), None).map(lambda *row: (row, 1.0))
            empty = tuple(tf.zeros(spec.shape, spec.dtype) for spec in records.element_spec[0])
            records = records.concatenate(tf.data.Dataset.from_tensors((empty, 0.0)).repeat())
            return records.take(request.steps * request.per_shard).skip(skip * request.per_shard)

        return _in_turn([read(shard) for shard in request.local_shards], request.per_shard)

    def read(self, parts: Sequence[Part], key: tuple[int, ...] | None) -> Any:
        """(encoded image, int32 label, file and place); files in a drawn order if keyed."""

        def reorder(files: list[Any]) -> list[Any]:
            return [files[i] for i in hash_rng.permutation(len(files), *key)]

        if not parts:
            empty = (b"", np.int32(0), b"") + ((np.zeros(self._classes, bool),) if self._several else ())
            return tf.data.Dataset.from_tensors(empty).take(0)
        config = tfds.ReadConfig(
            try_autocache=False,
            interleave_cycle_length=_CYCLE,
            interleave_block_length=_BLOCK,
            enable_ordering_guard=False,
            skip_prefetch=True,
            add_tfds_id=True,
            experimental_interleave_sort_fn=reorder if key is not None else None,
        )
        keys = dict.fromkeys(filter(None, (self._image, self._label, self._several)), True)
        ranges = [
            tfds.core.ReadInstruction(name, from_=start, to=stop, unit="abs") for name, start, stop in parts
        ]
        records = self._builder.as_dataset(
            split=functools.reduce(operator.add, ranges),
            read_config=config,
            decoders=tfds.decode.PartialDecoding(keys, decoders={self._image: tfds.decode.SkipDecoding()}),
            shuffle_files=False,
        )

        @tf.autograph.experimental.do_not_convert
        def pick(row: Any) -> tuple[Any, ...]:
            fields = row[self._image], tf.cast(row[self._label], tf.int32), row["tfds_id"]
            if not self._several:
                return fields
            known = tf.one_hot(row[self._several], self._classes)  # [labels, K]
            return *fields, tf.reduce_any(known > 0, 0)

        return records.map(pick)

    def in_order(self, split: str, count: int) -> bool:
        """Whether a split was written in order: TFDS then says so, Hugging Face's sets do not.

        Those are known by their ends, if both are sorted and do not overlap.
        """
        if self._builder.info.disable_shuffling:
            return True
        if count < 2 * _ENDS:
            return False
        ends = [self.read([(split, at, at + _ENDS)], None) for at in (0, count - _ENDS)]
        try:
            first, last = ([int(row[1]) for row in end.as_numpy_iterator()] for end in ends)
        except tf.errors.OpError as error:
            raise unreadable(self._builder.info.full_name, error, self.where) from None
        return first == sorted(first) and last == sorted(last) and first[-1] < last[0]


def _in_turn(streams: list[Any], block: int) -> Any:
    """`block` elements of each stream in turn."""
    if len(streams) == 1:
        return streams[0]
    data = tf.data.Dataset
    turns = data.range(len(streams)).repeat().flat_map(lambda i: data.from_tensors(i).repeat(block))
    return data.choose_from_datasets(streams, turns, stop_on_empty_dataset=True)


class TfdsSource:
    """A TFDS data set by name; see `open_tfds`."""

    def __init__(self, name: str, data_dir: str, max_corrupt: int):
        self._name, self._data_dir, self._max_corrupt = name, data_dir, max_corrupt
        self._path = _find(name, data_dir)

    def _open(self) -> tuple[Any, DataInfo]:
        if self._path is None:
            raise _absent(self._name, self._data_dir)
        return _read(self._name, os.fspath(self._path))

    @property
    def info(self) -> DataInfo:
        """From the folder; for an absent set from the table of common ones."""
        known = KNOWN_DATASETS.get(re.split("[:/]", self._name)[0])
        return known if self._path is None and known is not None else self._open()[1]

    def _source(self, parts: Sequence[Part], train: bool) -> Any:
        builder, info = self._open()
        shape = info.image_shape
        if shape is not None and sum(info.splits.values()) * int(np.prod(shape)) < IN_MEMORY_BYTES:
            path = os.fspath(self._path)
            return ArraySource(info, lambda split: _decoded(self._name, path, split))
        records = TfdsRecords(builder)
        for split, start, stop in parts:
            count = info.splits[split]
            if (train or stop - start < count) and records.in_order(split, count):
                raise DataError(
                    f"split {split!r} of data set {self._name!r} is stored in order, so a slice or a part of a batch "
                    "would hold some classes only: write it again with TFDS's shuffling (disable_shuffling=False), "
                    "or as a folder of images"
                )
        return StreamSource(records, info, self._max_corrupt)

    def train(self, request: TrainRequest) -> Iterator[Batch]:
        return self._source(request.parts, True).train(request)

    def evaluate(self, request: EvalRequest) -> Iterator[Batch]:
        return self._source(request.parts, False).evaluate(request)


def open_tfds(name: str, data_dir: str | None, *, max_corrupt: Natural = MAX_CORRUPT) -> TfdsSource:
    """The TFDS set `name[/config][:version]`, read from `data_dir`.

    `max_corrupt` images of a streamed set may fail to decode before a run gives up.
    """
    if not _NAME.match(name):
        hint = f"; a folder of pictures is written folder:{name}" if os.path.isdir(name) else ""
        raise UnknownNameError(f"data set {name!r} is not of the form name, name:1.0.0 or name/config{hint}")
    return TfdsSource(name, data_dir or default_data_dir(), max_corrupt)
