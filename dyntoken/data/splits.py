"""Splits and their parts: rows of a data set laid end to end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dyntoken.data.errors import DataError
from dyntoken.registry import suggest

Part = tuple[str, int, int]  # split name, first row, one past the last row
_PART = re.compile(r"^([^\[\]+:]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?$")


def parse_split(name: str, split: str | Sequence[str], counts: Mapping[str, int]) -> tuple[Part, ...]:
    """Reads `"train"`, `"train[:90%]"`, `"train+test"` or a sequence of these.

    Args:
      name: the data set, for messages.
      split: slices are in examples or per cent, in TFDS' spelling; several
        parts follow each other.
      counts: examples per split.

    Returns:
      One (split, start, stop) per part.

    Raises:
      DataError: no such split, bad syntax, a slice beyond the split, or a part without examples.
    """
    texts = split.split("+") if isinstance(split, str) else [t for s in split for t in s.split("+")]
    parts = []
    for text in texts:
        match = _PART.match(text.strip())
        if match is None:
            raise DataError(f"split {text!r} is not of the form 'train', 'train[:90%]' or 'train[100:]'")
        key, first, last = match.groups()
        if key not in counts:
            raise DataError(f"data set {name!r} has no split {key!r}: {suggest(key, counts)}")
        what = f"split {text!r} of data set {name!r}"
        start, stop = _bound(first, counts[key], 0, what), _bound(last, counts[key], counts[key], what)
        if stop <= start:
            raise DataError(f"{what} holds no example: rows {start} to {stop} of {counts[key]}")
        parts.append((key, start, stop))
    if not parts:
        raise DataError(f"split {split!r} of data set {name!r} holds no example")
    return tuple(parts)


def _bound(text: str | None, count: int, default: int, what: str) -> int:
    if text is None:
        return default
    value, most = (int(text[:-1]), 100) if text.endswith("%") else (int(text), count)
    if abs(value) > most:
        raise DataError(f"{what}: {text} lies outside the split's {count} examples")
    rows = round(value * count / 100) if text.endswith("%") else value
    return rows + count if value < 0 else rows


def count_rows(parts: Sequence[Part]) -> int:
    """Number of examples in all parts together."""
    return sum(stop - start for _, start, stop in parts)


def slice_parts(parts: Sequence[Part], start: int, stop: int) -> tuple[Part, ...]:
    """Rows `start .. stop - 1` of the parts laid end to end, as parts."""
    out, base = [], 0
    for name, first, last in parts:
        low, high = max(start - base, 0), min(stop - base, last - first)
        if high > low:
            out.append((name, first + low, first + high))
        base += last - first
    return tuple(out)


def portion(count: int, portions: int, index: int) -> range:
    """The rows of one of several portions of `count` rows, as equal as they can be."""
    return range(index * count // portions, (index + 1) * count // portions)
