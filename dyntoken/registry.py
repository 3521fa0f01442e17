"""Names to objects: one table per family, imported on use."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of an error message: the nearest names, or all if few."""
    known = sorted(known, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.55)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"known: {', '.join(known[:12])}" + (", ..." if len(known) > 12 else "")


class UnknownNameError(KeyError, ValueError):
    """A name that no table holds; the message lists the nearest ones."""

    def __str__(self) -> str:
        return str(self.args[0])


class Table(Mapping[str, Any]):
    """A mapping from a name to `"module:Object"` or to any object.

    Strings of that form are imported when they are looked up, so that a table
    costs nothing at import time. An unknown name raises `UnknownNameError`. Rows
    are only ever added (`register`): a compiled program knows them by name, and
    would go on with the old one.
    """

    def __init__(self, kind: str, rows: Mapping[str, Any]):
        self.kind = kind
        self._rows = dict(rows)

    def __getitem__(self, name: str) -> Any:
        if name not in self._rows:
            raise UnknownNameError(f"unknown {self.kind} {name!r}: {suggest(str(name), self._rows)}")
        row = self._rows[name]
        if isinstance(row, str) and ":" in row:
            module, _, attribute = row.partition(":")
            return getattr(importlib.import_module(module), attribute)
        return row

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def register(self, name: str, row: Any) -> None:
        """Adds a row.

        Raises:
          ValueError: the name is no identifier, or stands in the table already.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{self.kind} {name!r}: a name is one word of letters, digits and underscores")
        if name in self._rows:
            raise ValueError(f"{self.kind} {name!r} is registered already: choose another name")
        self._rows[name] = row


def check_call(what: str, fn: Any, *args: Any, **options: Any) -> None:
    """Raises ValueError unless `fn` is a function that may be called with such arguments."""
    if not callable(fn):
        raise ValueError(f"{what} must be a function, got {fn!r}")
    try:
        inspect.signature(fn).bind(*args, **options)
    except TypeError as error:
        takes = ", ".join([*map(str, args), *(f"{name}=" for name in options)])
        raise ValueError(f"{what} is called with ({takes}), which it does not take: {error}") from error


def load_plugins(modules: str | Sequence[str]) -> tuple[str, ...]:
    """Imports modules that register rows of their own.

    Args:
      modules: names as of `import`, in one text with commas between or in a sequence.

    Raises:
      ImportError: a module that is not there, or one that it imports.
    """
    names = modules.split(",") if isinstance(modules, str) else modules
    names = tuple(name.strip() for name in names if name.strip())
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"plugin {name!r} does not import: {error}") from error
    return names


def check_options(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises `UnknownNameError` for the first option that is not known."""
    known = set(known)
    for name in given:
        if name not in known:
            raise UnknownNameError(f"unknown option {name!r} of {what}: {suggest(name, known)}")
