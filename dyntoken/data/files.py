"""Single picture files, decoded and resized as evaluation does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dyntoken.data.info import DataInfo
from dyntoken.data.requests import EvalRequest
from dyntoken.data.splits import Part
from dyntoken.data.stream import StreamSource
from dyntoken.data.tf_import import tensorflow


class _Given:
    """`Records` of files in the given order."""

    buffer = 0
    where = "the given files"

    def __init__(self, paths: Sequence[str]):
        self._paths = np.array([path.encode() for path in paths], object)

    def rows(self, parts: Sequence[Part], key: tuple[int, ...] | None) -> Any:
        tf = tensorflow()
        paths = np.concatenate([np.zeros(0, object), *(self._paths[start:stop] for _, start, stop in parts)])
        names = tf.constant(paths, tf.string, shape=paths.shape)
        return tf.data.Dataset.from_tensor_slices((names, tf.zeros(len(paths), tf.int32), names))

    @staticmethod
    def load(pointer: Any) -> Any:
        return tensorflow().io.read_file(pointer)

    def why(self, name: bytes, channels: int) -> str:
        return ""


def read_files(
    paths: Sequence[str],
    *,
    size: tuple[int, int],
    channels: int,
    crop_pct: float,
    interpolation: str,
    batch: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batch after batch of some files, in order.

    Args:
      paths: of the files; at least one.
      size, crop_pct, interpolation: see `data.eval_batches`.
      channels: 3, or 1 for grey.
      batch: images at a time; the last batch is shorter.

    Yields:
      (uint8 `[b, h, w, channels]`, bool `[b]`: the file decodes; where it does
      not, its image means nothing).

    Raises:
      MissingDataError: TensorFlow is not installed.
    """
    info = DataInfo("files", 1, None, {"all": len(paths)}, (0.0,) * channels, (1.0,) * channels)
    source = StreamSource(_Given(paths), info, max_corrupt=len(paths))
    plan = EvalRequest(
        parts=(("all", 0, len(paths)),),
        batch=batch,
        size=size,
        shards=1,
        process=(0, 1),
        crop_pct=crop_pct,
        interpolation=interpolation,
    )
    for number, rows in enumerate(source.evaluate(plan)):
        count = min(batch, len(paths) - number * batch)
        yield rows["image"][:count], rows["mask"][:count] > 0
