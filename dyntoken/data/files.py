"""Image files: batches of them by index, as `stream.Records`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dyntoken.data import hash_rng
from dyntoken.data.decode import decode
from dyntoken.data.errors import DataError
from dyntoken.data.info import DataInfo
from dyntoken.data.requests import EvalRequest, TrainRequest
from dyntoken.data.splits import Part
from dyntoken.data.stream import FILE_ORDER, SHARD_BITS, Records, StreamSource
from dyntoken.data.tf_import import tf

Split = tuple[np.ndarray, np.ndarray]  # paths bytes `[N]`, int32 labels `[N]`


class FileRecords(Records):
    """Records over files that are read at random: what a batch holds is index arithmetic."""

    where = "see that its files can be read"
    labels_known = True

    def __init__(self, splits: Mapping[str, Split]):
        self._splits = splits

    def _join(self, parts: Sequence[Part]) -> Split:
        pieces = [[column[start:stop] for column in self._splits[name]] for name, start, stop in parts]
        paths, labels = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return paths, labels

    def train(self, request: TrainRequest, epoch: int, block: int, skip: int) -> Any:
        paths, labels = self._join(request.parts)
        key = (request.seed, epoch, FILE_ORDER)
        balanced = hash_rng.balanced(labels, *key) if request.balance else None
        orders = {}
        for shard in request.local_shards:
            rows = request.shard(shard)
            if balanced is None:
                orders[shard] = rows.start + hash_rng.permutation(len(rows), *key, shard)
            else:
                orders[shard] = balanced[rows.start : rows.stop]
        count = min(map(len, orders.values())) // block * block
        ids = np.stack([order[skip * block : count] for order in orders.values()])
        numbers = np.array([*orders], np.int64)[:, None] << SHARD_BITS | np.arange(skip * block, count)
        ids, numbers = _in_turn(ids, block), _in_turn(numbers, block)
        return _dataset(numbers, _rows(paths[ids], labels[ids]))

    def evaluate(self, request: EvalRequest, skip: int) -> Any:
        paths, labels = self._join(request.parts)
        at = np.arange(skip * request.per_shard, request.steps * request.per_shard)
        shards = [request.shard(shard) for shard in request.local_shards]
        ids = _in_turn(np.stack([rows.start + at for rows in shards]), request.per_shard)
        known = _in_turn(np.stack([at < len(rows) for rows in shards]), request.per_shard)
        ids = np.where(known, ids, 0)
        rows = _rows(np.where(known, paths[ids], b""), np.where(known, labels[ids], 0))
        return _dataset(rows, known.astype(np.float32))

    @staticmethod
    def load(pointer: Any) -> Any:
        return tf.io.read_file(pointer)

    def why(self, name: bytes, channels: int) -> str:
        from etils import epath

        try:
            decode(epath.Path(os.fsdecode(name)).read_bytes(), channels)
        except (DataError, OSError) as error:
            return getattr(error, "strerror", None) or str(error)
        return ""


def _in_turn(rows: np.ndarray, block: int) -> np.ndarray:
    """`[shards, n]` -> `[shards n]`: `block` entries of each shard in turn."""
    return rows.reshape(len(rows), -1, block).swapaxes(0, 1).ravel()


def _rows(paths: np.ndarray, labels: np.ndarray) -> tuple[Any, Any, Any]:
    names = tf.constant(paths, tf.string, shape=paths.shape)
    return names, tf.constant(labels, tf.int32), names


def _dataset(*columns: Any) -> Any:
    return tf.data.Dataset.from_tensor_slices(columns)


def read_files(
    paths: Sequence[str],
    *,
    size: tuple[int, int],
    channels: int,
    crop_pct: float,
    interpolation: str,
    batch: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batch after batch of some files, in order; the last is shorter. See `data.eval_batches`.

    Yields:
      (uint8 `[b, h, w, channels]`, bool `[b]`: the file decodes; where it does
      not, its image means nothing).
    """
    info = DataInfo("files", 1, None, {"all": len(paths)}, (0.0,) * channels, (1.0,) * channels)
    split = np.array([os.fsencode(path) for path in paths], object), np.zeros(len(paths), np.int32)
    source = StreamSource(FileRecords({"all": split}), info, max_corrupt=len(paths))
    request = EvalRequest(
        parts=(("all", 0, len(paths)),),
        batch=batch,
        size=size,
        shards=1,
        process=(0, 1),
        crop_pct=crop_pct,
        interpolation=interpolation,
    )
    for number, rows in enumerate(source.evaluate(request)):
        count = min(batch, len(paths) - number * batch)
        yield rows["image"][:count], rows["mask"][:count] > 0
