"""`folder:DIR`: images in one folder per class, JPEG or PNG.

`DIR/train/CLASS/*.jpg` and `DIR/val/CLASS/*.jpg` (any names of splits), or
`DIR/CLASS/*.jpg`, which is one split `train`. Classes are numbered in the order
of their names, images in the order of theirs, as torchvision's ImageFolder has
them; the classes are those of `train` where there is one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dyntoken import paths
from dyntoken.data import stateless
from dyntoken.data.arrays import Batch
from dyntoken.data.cards import default_moments
from dyntoken.data.errors import DataError, MissingDataError
from dyntoken.data.plan import DataInfo, EvalPlan, Part, TrainPlan
from dyntoken.data.stream import MAX_CORRUPT, StreamSource
from dyntoken.data.tf_import import tensorflow
from dyntoken.registry import suggest
from dyntoken.schema import Natural

SUFFIXES = (".jpg", ".jpeg", ".png")


def _folders(path: Any) -> list[Any]:
    return sorted(
        (f for f in path.iterdir() if not f.name.startswith(".") and f.is_dir()), key=lambda f: f.name
    )


def _images(path: Any) -> list[str]:
    names = (f.name for f in path.iterdir())
    return sorted(n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith("."))


@functools.lru_cache(maxsize=8)
def _scan(root: str) -> tuple[tuple[str, ...], Mapping[str, tuple[np.ndarray, np.ndarray]]]:
    """(class names, split -> (paths bytes `[N]`, int32 labels `[N]`)) of a tree."""
    from etils import epath

    top = epath.Path(root).expanduser()
    if not top.is_dir():
        raise MissingDataError(
            f"no folder {top}: give folder:DIR with DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg"
        )
    first = _folders(top)
    flat = any(_images(folder) for folder in first)
    splits = {"train": first} if flat else {folder.name: _folders(folder) for folder in first}
    splits = {name: classes for name, classes in splits.items() if classes}
    if not splits:
        raise DataError(
            f"folder {top} holds no class folder: it needs DIR/train/CLASS/*.jpg or DIR/CLASS/*.jpg"
        )
    known = tuple(f.name for f in splits.get("train", next(iter(splits.values()))))
    return known, {name: _split(name, classes, known, top) for name, classes in splits.items()}


def _split(
    name: str, classes: Sequence[Any], known: Sequence[str], top: Any
) -> tuple[np.ndarray, np.ndarray]:
    number = {label: i for i, label in enumerate(known)}
    paths, labels = [], []
    for folder in classes:
        if folder.name not in number:
            raise DataError(
                f"split {name!r} of folder {top} has a class {folder.name!r} that the others lack: "
                f"{suggest(folder.name, known)}"
            )
        images = _images(folder)
        paths += [f"{folder}/{image}".encode() for image in images]
        labels += [number[folder.name]] * len(images)
    if not paths:
        raise DataError(f"split {name!r} of folder {top} holds no image ({', '.join(SUFFIXES)})")
    return np.array(paths, object), np.array(labels, np.int32)


class _Files:
    """`Records` over files that are read at random."""

    buffer = 0  # the drawn order is a permutation of the whole shard

    def __init__(self, splits: Mapping[str, tuple[np.ndarray, np.ndarray]]):
        self._splits = splits

    def rows(self, parts: Sequence[Part], key: tuple[int, ...] | None) -> Any:
        tf = tensorflow()
        pieces = [[a[start:stop] for a in self._splits[name]] for name, start, stop in parts]
        empty = (np.zeros(0, object), np.zeros(0, np.int32))
        paths, labels = (np.concatenate(column) for column in zip(empty, *pieces, strict=True))
        if key is not None:
            order = stateless.permutation(len(paths), *key)
            paths, labels = paths[order], labels[order]
        names = tf.constant(paths, tf.string, shape=paths.shape)
        return tf.data.Dataset.from_tensor_slices((names, tf.constant(labels), names))

    def load(self, pointer: Any) -> Any:
        return tensorflow().io.read_file(pointer)


class FolderSource:
    """A folder of images; see `open_folder`."""

    def __init__(self, name: str, root: str, channels: int, max_corrupt: int):
        self._name, self._root, self._channels, self._max_corrupt = name, root, channels, max_corrupt

    @functools.cached_property
    def info(self) -> DataInfo:
        """Counts and class names; reads names of files only."""
        classes, splits = _scan(self._root)
        mean, std = default_moments(self._name, self._channels)
        counts = {name: len(labels) for name, (_, labels) in splits.items()}
        return DataInfo(self._name, len(classes), None, counts, mean, std, classes)

    def _source(self) -> StreamSource:
        return StreamSource(_Files(_scan(self._root)[1]), self.info, self._max_corrupt)

    def train(self, plan: TrainPlan) -> Iterator[Batch]:
        tensorflow()
        return self._source().train(plan)

    def evaluate(self, plan: EvalPlan) -> Iterator[Batch]:
        tensorflow()
        return self._source().evaluate(plan)


def open_folder(
    name: str, data_dir: str | None, *, channels: Literal[1, 3] = 3, max_corrupt: Natural = MAX_CORRUPT
) -> FolderSource:
    """The images under `folder:DIR`; a relative DIR is one of `data_dir` if that is given.

    Args:
      channels: 3, or 1 to read in grey.
      max_corrupt: images that may fail to decode before a run gives up.

    Raises:
      DataError: a bad number of channels, or no folder given.
    """
    root = name.partition(":")[2]
    if not root or channels not in (1, 3):
        raise DataError(f"data set {name!r} with channels={channels}: give folder:DIR, and 1 or 3 channels")
    if data_dir:
        root = paths.join(data_dir, root)
    if paths.is_uri(root):
        paths.resolve(root)  # a kind that is not read, or no answer
    return FolderSource(name, root, channels, max_corrupt)
