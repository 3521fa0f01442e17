"""`folder:DIR`: images in one folder per class, of every format that decodes (`decode.SUFFIXES`).

`DIR/train/CLASS/...` and `DIR/val/CLASS/...`, or `DIR/CLASS/...`, which is one split
`train`; the images of a class may lie in folders of its folder. It is the first form
if a folder in DIR is called as splits are (`SPLITS`); the others are splits, too, then,
whatever their names. Hidden files and what programs leave behind (`JUNK`) do not count.

Classes are numbered in the order of their names, as torchvision's ImageFolder numbers
them, but names that are all numbers in the order of their values, which
torchvision sorts as text. They are those of `train` where there is one; another split
may lack some. What cannot be told apart, and a class without images, is refused.

The images of a split lie in a fixed random order, which depends on their names alone,
and in which any slice (`train[:90%]`) holds its share of each class: a class of n images
has n/10 of them, to within one, in every tenth of the split.
"""

from __future__ import annotations

import collections
import functools
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dyntoken import paths
from dyntoken.data import hash_rng
from dyntoken.data.decode import SUFFIXES, decode
from dyntoken.data.errors import DataError, MissingDataError
from dyntoken.data.in_memory import Batch
from dyntoken.data.info import DataInfo
from dyntoken.data.known_datasets import default_moments
from dyntoken.data.requests import EvalRequest, TrainRequest
from dyntoken.data.splits import Part
from dyntoken.data.stream import MAX_CORRUPT, StreamSource
from dyntoken.data.tf_import import tensorflow
from dyntoken.registry import suggest
from dyntoken.schema import Natural

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "eval", "evaluation", "dev")
JUNK = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "lost+found")
_FORMS = "DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg"
_DEEPEST = 12  # folders in each other; more are links to a folder above
_ORDER = 21  # key of the fixed order
_log = logging.getLogger(__name__)
Split = tuple[np.ndarray, np.ndarray]  # paths bytes `[N]`, int32 labels `[N]`


class _Folder:
    """What lies in a folder: names of images, of other files, and further folders.

    Attributes:
      path: where.
      images, others: names of files.
      folders: in the order of their names.
    """

    def __init__(self, path: Any, depth: int = 0):
        if depth > _DEEPEST:
            raise DataError(f"folder {path} lies over {_DEEPEST} deep: is a link to a folder above in it?")
        self.path, self.images, self.others, self.folders = path, [], [], []
        for entry in sorted(path.iterdir(), key=lambda entry: entry.name):
            name = entry.name.lower()
            if name.startswith(".") or name in JUNK:
                continue
            if name.endswith(SUFFIXES):
                self.images.append(entry.name)
            elif entry.is_dir():
                self.folders.append(_Folder(entry, depth + 1))
            else:
                self.others.append(entry.name)

    @property
    def name(self) -> str:
        return self.path.name

    @functools.cached_property
    def all_images(self) -> list[str]:
        """Paths of the images in it and in its folders, from here."""
        inner = [f"{folder.name}/{image}" for folder in self.folders for image in folder.all_images]
        return [*self.images, *inner]

    def suffixes(self) -> collections.Counter[str]:
        """How many other files there are, by the ends of their names."""
        found = collections.Counter(os.path.splitext(name)[1] or name for name in self.others)
        return sum((folder.suffixes() for folder in self.folders), found)


def _splits(top: _Folder) -> dict[str, _Folder]:
    """Split -> the folder of its class folders.

    Raises:
      DataError: it cannot be told which folders are splits and which classes.
    """
    where, named = f"folder {top.path}", [f for f in top.folders if f.name.lower() in SPLITS]
    full = [folder for folder in top.folders if folder.all_images]
    flat = [folder.name for folder in full if folder.images]
    if not top.folders:
        raise DataError(f"{where} holds no class folder: it needs {_FORMS}")
    if named and (len(flat) < len(full) or {*flat} <= {f.name for f in named}):
        if flat:
            stray = next(folder for folder in full if folder.images)
            raise DataError(
                f"{where}: {named[0].name!r} looks like a split, but images lie in {_spell(flat)} itself and not "
                f"in class folders ({len(stray.images)} in {stray.name}, the first {stray.images[0]!r}): sort "
                f"them into {flat[0]}/CLASS/, or move that folder elsewhere; is {named[0].name!r} a class, put "
                "the class folders into DIR/train/"
            )
        return {f.name: f for f in top.folders if f in full or (f in named and f.folders)} or {"train": top}
    if full and not flat:  # two floors of folders, none of which is called as splits are
        inner = [{f.name for f in folder.folders if f.all_images} for folder in full]
        most = max(inner, key=len)
        if len(full) == 1 or any(name.lower() in SPLITS for name in most):
            raise DataError(f"{where} holds its images further down: give folder:{full[0].path}")
        if len(most) > 1 and all(names <= most for names in inner):
            raise DataError(
                f"{where}: are {_spell([f.name for f in full])} splits, or classes with folders inside? Call splits "
                f"{', '.join(SPLITS[:3])} or alike; put classes into DIR/train/"
            )
    return {"train": top}


def _spell(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")


def _ordered(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Class names in the order of their labels."""
    if not all(name.isdecimal() for name in names):
        return tuple(sorted(names))
    ordered = tuple(sorted(names, key=lambda name: (int(name), name)))
    if len({int(name) for name in names}) < len(names):
        raise DataError(f"{where}: two class folders have the same number, rename one of {_spell(ordered)}")
    if ordered != tuple(sorted(names)):
        _log.warning(
            "%s: classes are numbered by value (%s); torchvision's ImageFolder sorts their names as text",
            where,
            ", ".join(ordered[:3]) + ", ...",
        )
    return ordered


@functools.lru_cache(maxsize=8)
def _scan(root: str) -> tuple[tuple[str, ...], Mapping[str, Split]]:
    """(class names, split -> its images) of a tree."""
    from etils import epath

    path = epath.Path(root).expanduser()
    if not path.is_dir():
        raise MissingDataError(f"no folder {path}: give folder:DIR with {_FORMS}")
    top = _Folder(path)
    splits = _splits(top)
    first = next((name for name in splits if name.lower() in SPLITS[:2]), next(iter(splits)))
    known = _ordered([folder.name for folder in splits[first].folders], f"folder {path}")
    made = {name: _split(name, folder, known, path) for name, folder in splits.items()}
    if others := top.suffixes():
        spelt = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(6))
        _log.warning("folder %s: files that are no images by their names are left out (%s)", path, spelt)
    return known, made


def _split(name: str, split: _Folder, known: Sequence[str], top: Any) -> Split:
    number = {label: i for i, label in enumerate(known)}
    where = f"split {name!r} of folder {top}"
    if split.images:
        raise DataError(f"{where} has images that lie in no class folder ({_spell(split.images)}): move them")
    if not split.all_images:
        raise DataError(f"{where} holds no image ({', '.join(SUFFIXES)})")
    paths, labels, keys = [], [], []
    for folder in split.folders:
        if folder.name not in number:
            raise DataError(
                f"{where} has a class {folder.name!r} that the others lack: {suggest(folder.name, known)}"
            )
        if not folder.all_images:
            found = ", ".join(f"{count} {suffix}" for suffix, count in folder.suffixes().items()) or "no file"
            raise DataError(
                f"{where}: class {folder.name!r} holds no image ({found} in {folder.path}; images end in "
                f"{', '.join(SUFFIXES)}): fill or remove that folder"
            )
        paths += [os.fsencode(f"{folder.path}/{image}") for image in folder.all_images]
        keys += [zlib.crc32(os.fsencode(image)) for image in folder.all_images]
        labels += [number[folder.name]] * len(folder.all_images)
    labels = np.array(labels, np.int32)
    order = hash_rng.stratified(labels, _ORDER, np.array(keys, np.uint64))
    return np.array(paths, object)[order], labels[order]


class _Files:
    """`Records` over files that are read at random."""

    buffer = 0  # the drawn order is a permutation of the whole shard
    where = "see that its files can be read"

    def __init__(self, splits: Mapping[str, Split]):
        self._splits = splits

    def _join(self, parts: Sequence[Part]) -> Split:
        pieces = [[a[start:stop] for a in self._splits[name]] for name, start, stop in parts]
        empty = (np.zeros(0, object), np.zeros(0, np.int32))
        paths, labels = (np.concatenate(column) for column in zip(empty, *pieces, strict=True))
        return paths, labels

    def rows(self, parts: Sequence[Part], key: tuple[int, ...] | None) -> Any:
        paths, labels = self._join(parts)
        return _dataset(paths, labels, None if key is None else hash_rng.permutation(len(paths), *key))

    def balanced(self, parts: Sequence[Part], start: int, stop: int, key: tuple[int, ...]) -> Any:
        """Rows `start .. stop - 1` of an epoch that has all classes equally often."""
        paths, labels = self._join(parts)
        return _dataset(paths, labels, hash_rng.balanced(labels, *key)[start:stop])

    @staticmethod
    def load(pointer: Any) -> Any:
        return tensorflow().io.read_file(pointer)

    def why(self, name: bytes, channels: int) -> str:
        from etils import epath

        try:
            decode(epath.Path(os.fsdecode(name)).read_bytes(), channels)
        except (DataError, OSError) as error:
            return getattr(error, "strerror", None) or str(error)
        return ""


def _dataset(paths: np.ndarray, labels: np.ndarray, order: np.ndarray | None) -> Any:
    tf = tensorflow()
    if order is not None:
        paths, labels = paths[order], labels[order]
    names = tf.constant(paths, tf.string, shape=paths.shape)
    return tf.data.Dataset.from_tensor_slices((names, tf.constant(labels), names))


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

    def train(self, plan: TrainRequest) -> Iterator[Batch]:
        tensorflow()
        return self._source().train(plan)

    def evaluate(self, plan: EvalRequest) -> Iterator[Batch]:
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
    if not root:
        raise DataError("data set 'folder:' names no folder: give folder:DIR")
    if channels not in (1, 3):
        raise DataError(f"data set {name!r}: data.options.channels is {channels}: give 1 or 3")
    if data_dir:
        root = paths.join(data_dir, root)
    if paths.is_uri(root):
        paths.resolve(root)  # a kind that is not read, or no answer
    return FolderSource(name, root, channels, max_corrupt)
