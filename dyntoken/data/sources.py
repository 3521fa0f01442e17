"""The table of data sets: one line here, one file at most, adds one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from dyntoken.data.arrays import Source
from dyntoken.registry import Table, check_call, check_options

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


def register_data(name: str, opener: Callable[..., Source]) -> None:
    """Adds a data set.

    Args:
      name: of the set.
      opener: `opener(name, data_dir, *, **options) -> Source`; reads no image. Of
        rows that can be read at random it returns an `arrays.ArraySource`.

    Raises:
      ValueError: a name that is taken, or a function of other arguments.
    """
    check_call(f"data set {name!r}", opener, "name", "data_dir")
    SOURCES.register(name, opener)


def open_source(name: str, data_dir: str | None = None, **options: Any) -> Source:
    """The data set of that name; any name outside the table is looked for in TFDS, `folder:DIR` on disk.

    Raises:
      UnknownNameError: no such data set or option, with the nearest names.
    """
    if name.startswith("folder:"):
        from dyntoken.data.folder import open_folder as opener
    elif name in SOURCES:
        opener = SOURCES[name]
    else:
        from dyntoken.data.tfds_source import open_tfds as opener
    known = [p.name for p in inspect.signature(opener).parameters.values() if p.kind is p.KEYWORD_ONLY]
    check_options(f"data set {name!r}", options, known)
    return opener(name, data_dir, **options)
