"""What a compiled program does, read from its HLO text: collectives, data movement, estimated cost.

Works on the text of any backend; the estimate needs what a TPU compiler writes
beside each fusion.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
PRODUCTS = {"dot", "convolution"}
# An operation that only moves or reshapes data; a fusion of nothing else is a copy.
MOVES = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "copy",
    "transpose",
    "reshape",
    "slice",
    "dynamic-slice",
    "dynamic-update-slice",
    "concatenate",
    "pad",
    "reverse",
    "broadcast",
    "convert",
    "bitcast-convert",
}
# Moves that the program waits for; an asynchronous copy is a prefetch.
SYNCHRONOUS_MOVES = ("copy", "transpose", "fusion")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of the program.

    Attributes:
      name: its name in the text.
      kind: its opcode; of an asynchronous collective the first half's, without "-start".
      bytes: size of its result.
      times: how often it runs, loops multiplied out (one of unknown length: once).
      cycles: the compiler's estimate for one run, or None.
      inside: opcodes in the computation it fuses, empty for no fusion.
      trips: rounds of a "while", if the text tells.
    """

    name: str
    kind: str
    bytes: int
    times: int
    cycles: int | None
    inside: frozenset[str] = frozenset()
    trips: int | None = None

    @property
    def group(self) -> str:
        """The class of operations it is counted under."""
        found = self.inside or {self.kind}
        if self.kind in COLLECTIVES:
            return "collectives"
        for group, marks in (
            ("matrix products and convolutions", PRODUCTS),
            ("sorts", {"sort"}),
            ("gathers and scatters", {"gather", "scatter"}),
            ("custom calls", {"custom-call"}),
        ):
            if found & marks:
                return group
        if found <= MOVES or self.kind.endswith("-start"):
            return "copies and layout"
        return "reductions" if found & {"reduce", "reduce-window"} else "element by element"


@dataclasses.dataclass(frozen=True)
class Count:
    """Operations of one kind: how many run (loops multiplied out), and the bytes of all their results."""

    kind: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """The compiler's estimate for one class of operations.

    Attributes:
      group: name of the class; count: operations that run.
      cycles: of those with an estimate; estimated: how many have one.
    """

    group: str
    count: int
    cycles: int
    estimated: int


def operations(text: str) -> tuple[Operation, ...]:
    """The instructions that run, in order; loops are entered, fusions are not.

    Args:
      text: of a compiled module (`jax.stages.Compiled.as_text()`).

    Raises:
      ValueError: no entry computation in the text.
    """
    entry, bodies = _computations(text)
    return tuple(_walk(bodies, entry, 1))


def unknown_loops(found: Sequence[Operation]) -> int:
    """Loops whose length the text does not tell, counted as one round."""
    return sum(op.kind == "while" and op.trips is None for op in found)


def collectives(found: Sequence[Operation]) -> tuple[Count, ...]:
    """Collectives by kind and size, largest first; bytes are those of all results on one device."""
    runs: dict[tuple[str, int], int] = {}
    for op in found:
        if op.kind in COLLECTIVES:
            runs[op.kind, op.bytes] = runs.get((op.kind, op.bytes), 0) + op.times
    rows = [Count(kind, count, count * size) for (kind, size), count in runs.items()]
    return tuple(sorted(rows, key=lambda row: (-row.bytes, row.kind)))


def counted(found: Sequence[Operation], *kinds: str) -> Count:
    """Operations of the given kinds, within fusions too (a fusion counts once)."""
    hits = [op for op in found if op.kind in kinds or op.inside & set(kinds)]
    total = sum(op.times * op.bytes for op in hits)
    return Count(kinds[0], sum(op.times for op in hits), total)


def costs(found: Sequence[Operation]) -> tuple[Cost, ...]:
    """The estimate by class of operations, dearest first."""
    groups: dict[str, list[Operation]] = {}
    for op in found:
        if op.kind not in FREE and not op.kind.endswith("-done"):
            groups.setdefault(op.group, []).append(op)
    rows = [
        Cost(
            group,
            sum(op.times for op in ops),
            sum(op.times * (op.cycles or 0) for op in ops),
            sum(op.times for op in ops if op.cycles is not None),
        )
        for group, ops in groups.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.cycles, row.group)))


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    shape: str
    kind: str
    rest: str

    def computation(self, role: str) -> str | None:
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None


def _computations(text: str) -> tuple[str, dict[str, list[_Line]]]:
    entry, bodies, current = "", {}, None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head and not line.startswith(" "):
            current = bodies.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_Line(*match.groups()))
    if not entry:
        raise ValueError("no entry computation: this is not the text of a compiled program")
    return entry, bodies


def _walk(bodies: dict[str, list[_Line]], name: str, times: int) -> Iterator[Operation]:
    for line in bodies.get(name, ()):
        if line.kind == "while":
            yield from _walk(bodies, line.computation("body"), times * (_trips(bodies, line) or 1))
        elif line.kind == "call":
            yield from _walk(bodies, line.computation("to_apply"), times)
        elif line.kind == "conditional":
            for branch in _branches(line):
                yield from _walk(bodies, branch, times)
        yield _operation(bodies, line, times)


def _trips(bodies: dict[str, list[_Line]], line: _Line) -> int | None:
    """Rounds of a loop: stated, or by a condition `counter < constant` (counters start at 0)."""
    stated = _TRIPS.search(line.rest)
    if stated:
        return int(stated.group(1))
    condition = bodies.get(line.computation("condition"), ())
    if not condition or condition[-1].kind != "compare" or "direction=LT" not in condition[-1].rest:
        return None
    limit = condition[-1].rest.partition(")")[0].rpartition("%")[2]
    values = [one.rest.partition(")")[0] for one in condition if one.kind == "constant" and one.name == limit]
    return int(values[0]) if values else None


def _branches(line: _Line) -> list[str]:
    listed = re.search(r"branch_computations=\{(.*?)\}", line.rest)
    if listed:
        return [name.strip().lstrip("%") for name in listed.group(1).split(",")]
    return [name for role in ("true_computation", "false_computation") if (name := line.computation(role))]


def _operation(bodies: dict[str, list[_Line]], line: _Line, times: int) -> Operation:
    kind = line.kind.removesuffix("-start") if line.kind.startswith(COLLECTIVES) else line.kind
    inside: frozenset[str] = frozenset()
    called = line.computation("calls")
    if called:
        inside = frozenset(_opcodes(bodies, called))
        wrapped = inside & set(COLLECTIVES)
        # `async-start` wraps what it starts.
        kind = next(iter(wrapped)) if wrapped else kind
    size = _bytes(line.shape)
    if line.kind.endswith("-start"):  # returns its operands, too
        size = _bytes_of_started(line.shape, kind)
    cycles = _CYCLES.search(line.rest)
    estimate = int(cycles.group(1)) if cycles else None
    trips = _trips(bodies, line) if kind == "while" else None
    return Operation(line.name, kind, size, times, estimate, inside, trips)


def _opcodes(bodies: dict[str, list[_Line]], name: str) -> Iterator[str]:
    for line in bodies.get(name, ()):
        yield line.kind
        if (called := line.computation("calls")) is not None:
            yield from _opcodes(bodies, called)


def _bytes(shape: str) -> int:
    return sum(map(_size, _SHAPE.finditer(shape)))


def _bytes_of_started(shape: str, kind: str) -> int:
    """The result of an asynchronous operation, whose first half also returns its operands and a context."""
    whole = [_size(match) for match in _SHAPE.finditer(shape)]
    if kind == "all-reduce":
        return sum(whole)  # returns its results alone
    return max(whole, default=0)


def _size(match: re.Match[str]) -> int:
    bits = int(match.group(2)) if match.group(2) else 8
    return math.prod(int(n) for n in match.group(3).split(",") if n) * max(bits, 8) // 8
