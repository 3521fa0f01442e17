"""What an option may be: types and ranges read off annotations, and how a value is spelled as text.

A key of a config, or a keyword of `create_model`, has the type that its dataclass
field or keyword argument is annotated with; a range stands beside it, as in
`Annotated[float, within("[0, 1)")]`. Whatever is annotated can be checked (`check`)
and set from a command line (`Text`); nothing is listed a second time.
"""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from dyntoken.registry import UnknownNameError, suggest

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_WORDS = {"none": None, "null": None, "true": True, "false": False}
_NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


class Text(str):
    """A value as it was typed; the type of its key says what it means."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A condition beside a type, in `Annotated`.

    Attributes:
      read: the value as it is kept; raises ValueError for one that is not allowed.
      allowed: what is, as the end of a sentence.
    """

    read: Callable[[Any], Any]
    allowed: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A mapping with keys of its own, in `Annotated`.

    Attributes:
      keys: from the mapping and the section around it to name -> annotation.
    """

    keys: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]


def within(interval: str) -> Rule:
    """The rule for numbers in an interval: `"[0, 1)"`, `"(0, inf)"`."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def read(value: Any) -> Any:
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(interval)
        return value

    if math.isinf(high):
        return Rule(read, f"of at least {low:g}" if interval[0] == "[" else f"above {low:g}")
    return Rule(read, f"in {interval}")


Count = Annotated[int, within("[1, inf)")]
Natural = Annotated[int, within("[0, inf)")]
Share = Annotated[float, within("[0, 1]")]
Rate = Annotated[float, within("[0, 1)")]  # of dropout: 1 would drop all
Positive = Annotated[float, within("(0, inf)")]
NonNegative = Annotated[float, within("[0, inf)")]
Size = Count | tuple[Count, Count]  # n, or (rows, columns)
Keep = float | int | tuple[float | int, ...]  # see `reducers.keep.keep_counts`
Interpolation = Literal["bicubic", "bilinear"]
Seed = Annotated[int, within("[0, 4294967295]")]  # jax.random.key takes larger ones for smaller ones


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(text) from error
    return text


Pattern = Annotated[str, Rule(_pattern, "that is a regular expression")]


class _Unknown(Exception):
    """A key that its section does not have."""


def fields(cls: type, but: Sequence[str] = ()) -> dict[str, Any]:
    """Name -> annotation of the fields of a dataclass (or linen module), apart from some."""
    hints = _hints(cls)
    return {f.name: hints.get(f.name, Any) for f in dataclasses.fields(cls) if f.name not in but}


def keywords(fn: Callable[..., Any], but: Sequence[str] = ()) -> dict[str, Any]:
    """Name -> annotation of the keyword-only arguments of a function, apart from some."""
    hints = _hints(fn)
    found = inspect.signature(fn).parameters.items()
    return {n: hints.get(n, Any) for n, p in found if p.kind is p.KEYWORD_ONLY and n not in but}


@functools.cache
def _hints(source: Any) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(source, include_extras=True)
    except Exception:  # somebody's own function: its types are for type checkers, or it is no plain function
        return {}


def check(kind: Any, value: Any, where: str = "", *, owner: str = "") -> Any:
    """A value as its annotation has it: dataclasses built, lists to tuples, 1 to 1.0, `Text` read.

    Args:
      kind: an annotation, or a mapping from names to annotations.
      value: what was given.
      where: its full name, `"config.optim"`; empty for the keywords of a function.
      owner: who takes them then, for messages.

    Raises:
      UnknownNameError: an option that nobody reads, or none of a few words; with the nearest.
      ValueError: one that is missing, or of another type or range.
    """
    try:
        return _convert(kind, value, where, {})
    except ValueError as error:
        if not owner:
            raise
        raise (UnknownNameError if isinstance(error, KeyError) else ValueError)(f"{owner}: {error}") from None
    except _Unknown as error:
        unknown = error.args[0]
        section, _, name = unknown.rpartition(".")
        paths = [path.split(".") for path, _ in leaves(kind, value, where)]
        known = dict.fromkeys(".".join(path[:n]) for path in paths for n in range(1, len(path) + 1))
        close = nearest(unknown, known)
        siblings = [path for path in known if path.rpartition(".")[0] == section]
        hint = f"did you mean {', '.join(close)}?" if close else suggest(unknown, siblings or known)
        raise UnknownNameError(f"unknown option {name!r} of {section or owner}: {hint}") from None


def leaves(kind: Any, value: Any, where: str = "", parent: Any = None) -> Iterator[tuple[str, Any]]:
    """Full name and annotation of every option there is, given the values so far."""
    value = _plain(value)
    value = value if isinstance(value, Mapping) else {}
    keys, _ = _opened(kind, value, parent or {}, where)
    if keys is None:
        yield where, kind
        return
    for name, inner in keys.items():
        yield from leaves(inner, value.get(name), f"{where}.{name}".strip("."), value)


def nearest(unknown: str, known: Iterable[str]) -> list[str]:
    """The dotted names that are alike: of the same section, else of any whose last part is alike."""
    section, _, name = unknown.rpartition(".")
    here = [path for path in known if path.rpartition(".")[0] == section]

    def alike(path: str) -> float:
        return difflib.SequenceMatcher(None, name, path.rpartition(".")[2]).ratio()

    for some in (here, known):
        close = sorted((path for path in some if alike(path) >= 0.65), key=lambda p: (-alike(p), len(p)))
        if close:
            return close[:4]
    return []


def checked(fn: Callable[..., Any], owner: str | None = None) -> Callable[..., Any]:
    """Decorator: the keyword-only arguments are checked as their annotations say; `owner` by default the module."""

    @functools.wraps(fn)
    def call(*args: Any, **given: Any) -> Any:
        kinds, name = keywords(fn), owner or fn.__module__.rpartition(".")[2]
        own = {k: check(kinds[k], v, f"{name}.{k}") if k in kinds else v for k, v in given.items()}
        return fn(*args, **own)

    return call


def describe(kind: Any) -> str:
    """What a value may be, as the end of "give ..."."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        rules = [rule.allowed for rule in args[1:] if isinstance(rule, Rule)]
        return " ".join([*([] if args[0] is Any else [describe(args[0])]), *rules])
    if origin is Literal:
        return " or ".join(map(str, args))
    if _is_union(kind):
        return ", or ".join(dict.fromkeys(describe(one) for one in args))
    if origin in (tuple, list, collections.abc.Sequence):
        if origin is tuple and args[-1] is not Ellipsis:
            return f"{len(args)} values, each {describe(args[0])}"
        return f"a sequence (3-6-9 or 3,6,9), each {describe(args[0])}"
    known = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    return "None" if kind in (None, types.NoneType) else known.get(kind, getattr(kind, "__name__", str(kind)))


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _opened(
    kind: Any, value: Mapping[str, Any], parent: Mapping[str, Any], where: str
) -> tuple[Mapping[str, Any] | None, type]:
    """The keys of a section and what it becomes; no keys for a single value."""
    if isinstance(kind, Mapping):
        return kind, dict
    rules, kind = getattr(kind, "__metadata__", ()), _bare(kind)
    for rule in rules:
        if isinstance(rule, Section):
            try:
                return rule.keys(value, parent), dict
            except UnknownNameError as error:  # the section names what there is not
                raise UnknownNameError(f"{where}: {error}") from None
    for member in typing.get_args(kind) if _is_union(kind) else (kind,):
        if dataclasses.is_dataclass(member):
            return fields(member), member
        if typing.get_origin(member) in (dict, collections.abc.Mapping):
            return dict.fromkeys(value, typing.get_args(member)[1]), dict
    return None, dict


def _bare(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value  # a ConfigDict is no Mapping


def _convert(kind: Any, value: Any, where: str, parent: Mapping[str, Any]) -> Any:
    value = _plain(value)
    keys, make = _opened(kind, value if isinstance(value, Mapping) else {}, parent, where)
    if keys is None:
        return _leaf(kind, value, where)
    if isinstance(value, Text):
        value = next((v for v in _readings(value) if v is None or isinstance(v, Mapping)), str(value))
        return _convert(kind, value, where, parent)
    if value is None and types.NoneType in typing.get_args(_bare(kind)):
        return None
    if isinstance(make, type) and dataclasses.is_dataclass(make) and isinstance(value, make):
        return value
    if not isinstance(value, Mapping):
        some = ", ".join(f"{where}.{name}" for name in list(keys)[:3])
        raise ValueError(f"{where} is {_shown(value)}: it is a section; set its keys ({some}, ...)")
    for name in value:
        if name not in keys:
            raise _Unknown(f"{where}.{name}".strip("."))
    for field in dataclasses.fields(make) if dataclasses.is_dataclass(make) else ():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in value:
            raise ValueError(f"{where}.{field.name} is missing")
    return make(**{str(k): _convert(keys[k], v, f"{where}.{k}".strip("."), value) for k, v in value.items()})


def _leaf(kind: Any, value: Any, where: str) -> Any:
    value = value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value  # an array
    readings = list(_readings(value)) if isinstance(value, Text) else [value]
    for exact in (True, False):
        for reading in readings:
            try:
                return _fit(kind, reading, exact)
            except (ValueError, TypeError, OverflowError):
                continue
    if kind is bool and isinstance(value, Text) and value in ("0", "1"):
        return value == "1"
    if isinstance(value, str) and typing.get_origin(_bare(kind)) is Literal:
        choices = typing.get_args(_bare(kind))
        raise UnknownNameError(f"{where} is {_shown(value)}: {suggest(value, choices)}")
    raise ValueError(f"{where} is {_shown(value)}: give {describe(kind)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fit(kind: Any, value: Any, exact: bool) -> Any:
    """The value as one type has it; raises ValueError. Not `exact`: 1 fits float, 3 a sequence."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = _fit(args[0], value, exact)
        for rule in args[1:]:
            value = rule.read(value) if isinstance(rule, Rule) else value
        return value
    if _is_union(kind):
        return _first(args, value, exact)
    if origin is Literal:
        _require(any(type(value) is type(one) and value == one for one in args))
    elif kind in (None, types.NoneType):
        _require(value is None)
    elif kind is bool:
        _require(type(value).__name__ in ("bool", "bool_"))  # also numpy's
        return bool(value)
    elif kind is int:
        _require(isinstance(value, numbers.Integral) or (not exact and float(value).is_integer()))
        _require(not isinstance(value, (bool, str)) and -(2**63) <= value < 2**63)
        return int(value)
    elif kind is float:
        _require(isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value))
        _require(not exact or not isinstance(value, numbers.Integral))
        return float(value)
    elif kind is str:
        _require(isinstance(value, (str, os.PathLike)))
        return os.fspath(value)
    elif origin in (tuple, list, collections.abc.Sequence):
        return _sequence(args, value, exact)
    elif isinstance(kind, type) and kind is not Any:
        _require(isinstance(value, kind))
    return value


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError


def _first(kinds: Sequence[Any], value: Any, exact: bool) -> Any:
    """The first member of a union that fits, one that needs no conversion before any other."""
    for strict in (True,) if exact else (True, False):
        for kind in kinds:
            try:
                return _fit(kind, value, strict)
            except (ValueError, TypeError, OverflowError):
                continue
    raise ValueError


def _sequence(args: Sequence[Any], value: Any, exact: bool) -> tuple[Any, ...]:
    several = len(args) < 2 or args[1] is Ellipsis
    if not exact and several and not isinstance(value, (list, tuple)):
        value = (value,)
    _require(isinstance(value, (list, tuple)) and (several or len(value) == len(args)))
    kinds = [args[0]] * len(value) if several else args
    return tuple(_fit(kind, one, exact) for kind, one in zip(kinds, value, strict=True))


def _readings(text: str) -> Iterator[Any]:
    """What a text may stand for, the likeliest first."""
    text = str(text)
    with contextlib.suppress(*_NO_LITERAL):
        yield ast.literal_eval(text)
    if text.lower() in _WORDS:
        yield _WORDS[text.lower()]
    if "," in text and all(_run(part) for part in text.split(",")):
        yield tuple(run if len(run) > 1 else run[0] for run in map(_run, text.split(",")))
    elif len(_run(text)) > 1:
        yield _run(text)
    yield text
    if "," in text:
        yield tuple(part.strip() for part in text.split(",") if part.strip())


def _run(text: str) -> tuple[int | float, ...]:
    """`3-6-9` or `224x320` as numbers, a single number alone; empty for anything else."""
    text = text.strip()
    if re.fullmatch(rf"[+-]?{_NUMBER}", text):
        return (_number(text),)
    for mark in "-x":
        if re.fullmatch(rf"{_NUMBER}(?:{mark}{_NUMBER})+", text):
            return tuple(_number(found) for found in re.findall(_NUMBER, text))
    return ()


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)
