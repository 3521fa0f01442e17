"""What a compiled program does, read from its HLO text: collectives, data movement, estimated cost.

Works on the text of any backend; the estimate needs what a TPU compiler writes beside each fusion.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
)
# Classes of operations; the first one that an operation, or anything it fuses, belongs to.
GROUPS = {
    "matrix products and convolutions": {"dot", "convolution"},
    "sorts": {"sort"},
    "gathers and scatters": {"gather", "scatter"},
    "custom calls": {"custom-call"},
}
NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
# What only moves or reshapes data; a fusion of nothing else is a copy.
MOVES = NOTHING | {
    *("copy", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate"),
    *("pad", "reverse", "broadcast", "convert", "bitcast-convert"),
}
FREE = NOTHING | {"while", "call", "conditional"}
SYNCHRONOUS = ("copy", "transpose", "fusion")  # copies that are waited for; a started one is a prefetch
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(?:pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
Bodies = dict[str, list["_Line"]]


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    shape: str
    kind: str
    rest: str

    def called(self, role: str) -> str:
        """The computation named under `role`, "" if none is."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction that runs.

    Attributes:
      kind: its opcode; of an asynchronous collective without "-start".
      bytes: size of its result.
      times: how often it runs, loops multiplied out (one of unknown length: once).
      opcodes: of the computation it fuses, or its own.
      cycles: the compiler's estimate for one run, or None.
      endless: a loop whose length the text does not tell.
    """

    kind: str
    bytes: int
    times: int
    opcodes: frozenset[str]
    cycles: int | None
    endless: bool = False

    @property
    def group(self) -> str:
        """The class of operations it is counted under."""
        if self.kind in COLLECTIVES:
            return "collectives"
        for group, opcodes in GROUPS.items():
            if self.opcodes & opcodes:
                return group
        if self.opcodes <= MOVES or self.kind.endswith("-start"):
            return "copies and layout"
        return "reductions" if self.opcodes & {"reduce", "reduce-window"} else "element by element"


def summary(text: str) -> dict[str, Any]:
    """What runs in a program, by class of operations; a dict of plain values.

    `collectives`: kind, count and bytes of all results on one device, largest first. `sorts`,
    `gathers`, `scatters`: how many run (a fusion counts once). `copies`: those that are waited for.
    `unknown_loops`: loops of unknown length, counted as one round. `estimate`: per class of
    operations, dearest first, how many run, the compiler's cycles, and how many have an estimate.

    Args:
      text: of a compiled module (`jax.stages.Compiled.as_text()`).

    Raises:
      ValueError: no entry computation in the text.
    """
    found = _operations(text)
    moved = [op for op in found if op.group == "copies and layout" and op.kind in SYNCHRONOUS]
    return {
        "collectives": _collectives(found),
        **{
            f"{kind}s": sum(op.times for op in found if kind in op.opcodes)
            for kind in ("sort", "gather", "scatter")
        },
        "copies": {"count": sum(op.times for op in moved), "bytes": sum(op.times * op.bytes for op in moved)},
        "unknown_loops": sum(op.endless for op in found),
        "estimate": _estimate(found),
    }


def _collectives(found: Sequence[Operation]) -> list[dict[str, Any]]:
    runs: dict[tuple[str, int], int] = {}
    for op in found:
        if op.kind in COLLECTIVES:
            runs[op.kind, op.bytes] = runs.get((op.kind, op.bytes), 0) + op.times
    rows = [{"kind": kind, "count": n, "bytes": n * size} for (kind, size), n in runs.items()]
    return sorted(rows, key=lambda row: (-row["bytes"], row["kind"]))


def _estimate(found: Sequence[Operation]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for op in found:
        if op.kind not in FREE and not op.kind.endswith("-done"):
            row = rows.setdefault(op.group, {"group": op.group, "count": 0, "cycles": 0, "estimated": 0})
            row["count"] += op.times
            row["cycles"] += op.times * (op.cycles or 0)
            row["estimated"] += op.times * (op.cycles is not None)
    return sorted(rows.values(), key=lambda row: (-row["cycles"], row["group"]))


def computations(text: str) -> tuple[Bodies, str]:
    """The instructions of each computation by its name, and the name of the entry."""
    bodies: Bodies = {}
    entry, lines = "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            lines.append(_Line(*match.groups()))
    if not entry:
        raise ValueError("no entry computation: this is not the text of a compiled program")
    return bodies, entry


def _operations(text: str) -> list[Operation]:
    """The instructions that run, in order; loops are entered, fusions are not."""
    bodies, entry = computations(text)
    return [*_walk(bodies, entry, 1)]


def _walk(bodies: Bodies, name: str, times: int) -> Iterator[Operation]:
    for line in bodies.get(name, ()):
        trips: int | None = 1
        if line.kind == "while":
            trips = _trips(bodies, line)
            yield from _walk(bodies, line.called("body"), times * (trips or 1))
        elif line.kind == "call":
            yield from _walk(bodies, line.called("to_apply"), times)
        elif line.kind == "conditional":
            listed = re.search(r"branch_computations=\{(.*?)\}", line.rest)
            branches = re.findall(r"[\w.\-]+", listed[1]) if listed else []
            for branch in branches or map(line.called, ("true_computation", "false_computation")):
                yield from _walk(bodies, branch, times)
        yield _operation(bodies, line, times, endless=trips is None)


def _trips(bodies: Bodies, line: _Line) -> int | None:
    """Rounds of a loop: stated, or by a condition `counter < constant` (counters start at 0)."""
    stated = _TRIPS.search(line.rest)
    if stated:
        return int(stated[1])
    condition = bodies.get(line.called("condition"), ())
    if not condition or condition[-1].kind != "compare" or "direction=LT" not in condition[-1].rest:
        return None
    limit = condition[-1].rest.partition(")")[0].rpartition("%")[2]
    values = [one.rest.partition(")")[0] for one in condition if one.kind == "constant" and one.name == limit]
    return int(values[0]) if values else None


def _operation(bodies: Bodies, line: _Line, times: int, endless: bool) -> Operation:
    kind = line.kind.removesuffix("-start") if line.kind.startswith(COLLECTIVES) else line.kind
    opcodes = frozenset(_opcodes(bodies, line.called("calls"))) or frozenset({kind})
    kind = next(iter(opcodes & {*COLLECTIVES}), kind)  # `async-start` wraps what it starts
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * max(int(bits or 8), 8) // 8
        for bits, dims in _SHAPE.findall(line.shape)
    ]
    # What is started returns its operands and a context beside its result; an all-reduce its results alone.
    started = line.kind.endswith("-start") and kind != "all-reduce"
    cycles = _CYCLES.search(line.rest)
    size = max(sizes, default=0) if started else sum(sizes)
    return Operation(kind, size, times, opcodes, int(cycles[1]) if cycles else None, endless)


def _opcodes(bodies: Bodies, name: str) -> Iterator[str]:
    for line in bodies.get(name, ()):
        yield line.kind
        yield from _opcodes(bodies, line.called("calls"))
