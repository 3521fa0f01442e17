"""The table of data sets: one line here, one file at most, adds one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from dyntoken import schema
from dyntoken.data.errors import DataError
from dyntoken.data.info import DataInfo
from dyntoken.data.requests import EvalRequest, TrainRequest
from dyntoken.registry import Table, UnknownNameError, check_call

Batch = dict[str, np.ndarray]
_TFDS = "dyntoken.data.tfds_source:open_tfds"

# name -> function(name, data_dir, **options) that returns a `Source`.
SOURCES = Table(
    "data set",
    {
        "fashion_mnist_mini": "dyntoken.data.mini:open_mini",
        "fake": "dyntoken.data.fake:open_fake",
        "fashion_mnist": _TFDS,
        "cifar10": _TFDS,
        "cifar100": _TFDS,
        "imagenet2012": _TFDS,
        "imagenet2012_real": _TFDS,
        "imagenet_v2": _TFDS,
        "i_naturalist2019": _TFDS,
    },
)
# Of names outside the table, which so needs no import of those that read it.
_OTHERS = Table("kind of data set", {"folder": "dyntoken.data.folder:open_folder", "tfds": _TFDS})


class Source(Protocol):
    """A data set: its description, and batches for a checked request."""

    @property
    def info(self) -> DataInfo: ...

    def train(self, request: TrainRequest) -> Iterator[Batch]: ...

    def evaluate(self, request: EvalRequest) -> Iterator[Batch]: ...


def register_data(name: str, opener: Callable[..., Source]) -> None:
    """Adds a data set.

    Args:
      name: of the set.
      opener: `opener(name, data_dir, *, **options) -> Source`; reads no image. Of
        rows that can be read at random it returns a `data.ArraySource`.

    Raises:
      ValueError: a name that is taken, or a function of other arguments.
    """
    check_call(f"data set {name!r}", opener, "name", "data_dir")
    SOURCES.register(name, opener)


def open_source(name: str, data_dir: str | None = None, **options: Any) -> Source:
    """The data set of that name; any name outside the table is looked for in TFDS, `folder:DIR` on disk.

    Raises:
      UnknownNameError: no such data set or option, with the nearest names.
      PathError: a data_dir that cannot be reached.
    """
    try:
        options = schema.check(source_options(name), options, owner=f"data set {name!r}")
    except UnknownNameError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from None
    if data_dir and "://" in data_dir:
        from dyntoken import paths  # which imports more than the sets that ship need

        paths.resolve(data_dir)  # a kind that is not read, or no answer
    return _opener(name)(name, data_dir, **options)


def source_options(name: str) -> dict[str, Any]:
    """The options of a data set: name -> annotation, see `schema`."""
    return schema.keywords(_opener(name))


def _opener(name: str) -> Callable[..., Source]:
    if name.startswith("folder:"):
        return _OTHERS["folder"]
    return SOURCES[name] if name in SOURCES else _OTHERS["tfds"]
