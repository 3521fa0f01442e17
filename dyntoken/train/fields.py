"""Checked keys: nothing that a config names goes unread."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dyntoken.registry import check_options


def fill(cls: type, given: Mapping[str, Any], what: str) -> Any:
    """An instance of a dataclass from a section of the config.

    Raises:
      UnknownNameError: for a key that is no field.
      ValueError: for a field without default that is not given.
    """
    fields = dataclasses.fields(cls)
    check_options(what, given, [field.name for field in fields])
    needed = [
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(f"{what}.{missing[0]} is missing")
    return cls(**given)


def check_keywords(
    what: str,
    fn: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    own: Sequence[str],
    also: Sequence[str] = (),
) -> None:
    """Raises for a key that `fn` does not take, or that the trainer sets itself."""
    parameters = inspect.signature(fn).parameters.items()
    known = {name for name, p in parameters if p.kind is p.KEYWORD_ONLY} - set(own)
    check_options(what, given, known | set(also))
