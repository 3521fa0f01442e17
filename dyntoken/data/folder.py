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
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dyntoken import paths
from dyntoken.data import hash_rng
from dyntoken.data.decode import SUFFIXES
from dyntoken.data.errors import DataError, MissingDataError, warn_once
from dyntoken.data.files import FileRecords, Split
from dyntoken.data.info import DataInfo
from dyntoken.data.known_datasets import default_moments
from dyntoken.data.requests import EvalRequest, TrainRequest
from dyntoken.data.sources import Batch
from dyntoken.data.stream import MAX_CORRUPT, StreamSource
from dyntoken.data.tf_import import tensorflow
from dyntoken.registry import suggest
from dyntoken.schema import Natural

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "eval", "evaluation", "dev")
JUNK = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "lost+found")
_FORMS = "DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg"
_DEEPEST = 12  # folders in each other; more are links to a folder above
_ORDER = 21  # key of the fixed order


class _Folder:
    """What lies in a folder: names of images, of other files, and further folders in the order of their names."""

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

    def other_suffixes(self) -> collections.Counter[str]:
        """How many files there are that are no images, by the ends of their names."""
        found = collections.Counter(os.path.splitext(name)[1] or name for name in self.others)
        return sum((folder.other_suffixes() for folder in self.folders), found)


def _find_splits(top: _Folder) -> dict[str, _Folder]:
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
                f"{where}: {named[0].name!r} looks like a split, but images lie in {_list(flat)} itself and not "
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
                f"{where}: are {_list([f.name for f in full])} splits, or classes with folders inside? Call splits "
                f"{', '.join(SPLITS[:3])} or alike; put classes into DIR/train/"
            )
    return {"train": top}


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")


def _number_classes(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Class names in the order of their labels."""
    if not all(name.isdecimal() for name in names):
        return tuple(sorted(names))
    ordered = tuple(sorted(names, key=lambda name: (int(name), name)))
    if len({int(name) for name in names}) < len(names):
        raise DataError(f"{where}: two class folders have the same number, rename one of {_list(ordered)}")
    return ordered


@functools.lru_cache(maxsize=8)
def _scan(root: str) -> tuple[tuple[str, ...], Mapping[str, Split]]:
    """(class names, split -> its images) of a tree."""
    from etils import epath

    path = epath.Path(root).expanduser()
    if not path.is_dir():
        raise MissingDataError(f"no folder {path}: give folder:DIR with {_FORMS}")
    top = _Folder(path)
    splits = _find_splits(top)
    first = next((name for name in splits if name.lower() in SPLITS[:2]), next(iter(splits)))
    classes = _number_classes([folder.name for folder in splits[first].folders], f"folder {path}")
    made = {name: _list_images(name, folder, classes, path) for name, folder in splits.items()}
    if classes != tuple(sorted(classes)):
        warn_once(
            f"folder {path}: classes are numbered by value ({', '.join(classes[:3])}, ...); torchvision's "
            "ImageFolder sorts their names as text"
        )
    if others := top.other_suffixes():
        spelt = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(6))
        warn_once(f"folder {path}: files that are no images by their names are left out ({spelt})")
    return classes, made


def _list_images(name: str, split: _Folder, classes: Sequence[str], top: Any) -> Split:
    where = f"split {name!r} of folder {top}"
    if split.images:
        raise DataError(f"{where} has images that lie in no class folder ({_list(split.images)}): move them")
    if not split.all_images:
        raise DataError(f"{where} holds no image ({', '.join(SUFFIXES)})")
    paths, labels, keys = [], [], []
    for folder in split.folders:
        if folder.name not in classes:
            raise DataError(
                f"{where} has a class {folder.name!r} that the others lack: {suggest(folder.name, classes)}"
            )
        if not folder.all_images:
            found = ", ".join(f"{n} {suffix}" for suffix, n in folder.other_suffixes().items()) or "no file"
            raise DataError(
                f"{where}: class {folder.name!r} holds no image ({found} in {folder.path}; images end in "
                f"{', '.join(SUFFIXES)}): fill or remove that folder"
            )
        paths += [os.fsencode(f"{folder.path}/{image}") for image in folder.all_images]
        keys += [zlib.crc32(os.fsencode(image)) for image in folder.all_images]
        labels += [classes.index(folder.name)] * len(folder.all_images)
    labels = np.array(labels, np.int32)
    order = hash_rng.stratified(labels, _ORDER, np.array(keys, np.uint64))
    return np.array(paths, object)[order], labels[order]


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
        tensorflow()
        return StreamSource(FileRecords(_scan(self._root)[1]), self.info, self._max_corrupt)

    def train(self, request: TrainRequest) -> Iterator[Batch]:
        return self._source().train(request)

    def evaluate(self, request: EvalRequest) -> Iterator[Batch]:
        return self._source().evaluate(request)


def open_folder(
    name: str, data_dir: str | None, *, channels: Literal[1, 3] = 3, max_corrupt: Natural = MAX_CORRUPT
) -> FolderSource:
    """The images under `folder:DIR`; a relative DIR is one of `data_dir` if that is given.

    They are read in grey for one channel; `max_corrupt` may fail to decode before a run gives up.
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
