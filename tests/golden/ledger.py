"""The books of one check: what was compared, how far off it was, what was left out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.golden.case import Case

ACTIVATION = 5e-5  # absolute on values up to 1, relative to the largest above
LOSS = 1e-5
GRADIENT = 1e-3  # relative L2 norm, per array or parameter
NEGLIGIBLE = 1e-6  # share of the largest gradient norm below which a parameter compares absolutely
NOISE = 1e-4  # the same for a parameter whose gradient is known to be rounding noise
TABLE = 1e-9  # schedules: the reference computes in double precision


@dataclasses.dataclass
class Row:
    """One array compared."""

    name: str
    absolute: float
    relative: float
    passed: bool
    detail: str = ""


class Ledger:
    """Collects comparisons of one case against its recorded arrays."""

    def __init__(self, case: Case):
        self.case = case
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.left_out: dict[str, str] = {}
        self.unbuilt: dict[str, str] = {}
        self.notes: list[str] = []

    # Reference side

    def expected(self, name: str) -> np.ndarray:
        """A recorded array."""
        return self.case.arrays[name]

    def holds(self, name: str) -> bool:
        return name in self.case.arrays

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.case.arrays if name.startswith(prefix)]

    # Comparisons

    def close(self, name: str, ours: Any, limit: float = ACTIVATION, expected: Any = None) -> None:
        """Floating-point array: max |difference| <= limit * max(1, max |reference|)."""
        theirs = np.asarray(self.expected(name) if expected is None else expected)
        ours = np.asarray(ours)
        if not self._shapes(name, ours, theirs):
            return
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        if not np.isfinite(ours).all():
            self._add(Row(name, np.inf, np.inf, False, "not finite"))
            return
        scale = float(np.abs(theirs).max(initial=0.0))
        absolute = float(np.abs(ours - theirs).max(initial=0.0))
        bound = limit * max(1.0, scale)
        relative = absolute / scale if scale else absolute
        self._add(Row(name, absolute, relative, absolute <= bound, f"limit {bound:.1e}"))

    def offer(self, name: str, ours: Any, limit: float = ACTIVATION) -> None:
        """`close`, if the case records this array; the audit catches what nobody offers."""
        if self.holds(name):
            self.close(name, ours, limit)

    def loss(self, name: str, ours: Any) -> None:
        """A loss value, to 1e-5."""
        self.close(name, ours, LOSS)

    def equal(self, name: str, ours: Any, expected: Any = None) -> None:
        """Array that must agree entry by entry (indices, decisions, counts)."""
        theirs = np.asarray(self.expected(name) if expected is None else expected)
        ours = np.asarray(ours)
        if not self._shapes(name, ours, theirs):
            return
        off = int((ours != theirs).sum())
        self._add(
            Row(name, float(off > 0), float(off > 0), off == 0, f"{off} of {theirs.size} entries differ")
        )

    def same_sets(self, name: str, ours: Any, expected: Any = None) -> None:
        """Index array `[B, k]`: the same members in every row, in any order."""
        theirs = np.asarray(self.expected(name) if expected is None else expected)
        ours = np.asarray(ours)
        if self._shapes(name, ours, theirs):
            self.equal(name, np.sort(ours, axis=-1), np.sort(theirs, axis=-1))

    def gradient(self, name: str, ours: Any, expected: Any = None, floor: float = 0.0) -> None:
        """Gradient array: relative L2 norm; absolute if the reference's norm is below `floor`."""
        theirs = np.asarray(self.expected(name) if expected is None else expected).astype(np.float64)
        ours = np.asarray(ours).astype(np.float64)
        if not self._shapes(name, ours, theirs):
            return
        norm = float(np.linalg.norm(theirs))
        distance = float(np.linalg.norm(ours - theirs))
        absolute = float(np.abs(ours - theirs).max(initial=0.0))
        if norm <= floor:
            # A value that is noise in the reference must be as negligible in ours.
            passed = distance <= max(floor, 1e-12)
            self._add(
                Row(
                    name,
                    absolute,
                    0.0,
                    passed,
                    f"negligible, compared absolutely: |difference| {distance:.1e}",
                )
            )
            return
        relative = distance / norm
        passed = bool(np.isfinite(relative)) and relative <= GRADIENT
        self._add(Row(name, absolute, relative, passed, f"relative L2 {relative:.1e}"))

    def gradients(self, file: str, ours: Mapping[str, Any], noise: str = "$^") -> None:
        """A whole file of gradients, in the reference's own keys and layouts.

        Args:
          noise: pattern of keys whose gradient is rounding noise on both sides: it is only held to be small.
        """
        theirs = self.case.tensors(file)
        for key in sorted(set(theirs) - set(ours)):
            self.fail(f"{file}: no gradient for {key}")
        for key in sorted(set(ours) - set(theirs)):
            self.fail(f"{file}: the reference has no gradient {key}")
        largest = max(
            (float(np.linalg.norm(value.astype(np.float64))) for value in theirs.values()), default=0.0
        )
        for key in sorted(set(theirs) & set(ours)):
            share = NOISE if re.search(noise, key) else NEGLIGIBLE
            self.gradient(f"{file}:{key}", ours[key], theirs[key], share * largest)
        self._mark(file)

    def table(self, name: str, ours: Any, expected: Any) -> None:
        """A table of numbers computed in double precision on both sides."""
        self.close(name, ours, TABLE * min(1.0, float(np.abs(expected).max(initial=0.0))), expected)

    def same(self, name: str, ours: Any, expected: Any) -> None:
        """Any two values that must be equal, such as lists of names."""
        passed = ours == expected
        detail = "" if passed else f"ours {_short(ours)}, reference {_short(expected)}"
        self._add(Row(name, float(not passed), float(not passed), passed, detail))

    def fail(self, message: str) -> None:
        self.failures.append(message)

    def skip(self, name: str, reason: str) -> None:
        """Leaves an array out, with the reason that is printed."""
        self.left_out[name] = reason

    def unsupported(self, name: str, reason: str) -> None:
        """A part of the case that needs what is not built yet: the case does not pass, nor does it fail."""
        self.unbuilt[name] = reason

    def note(self, message: str) -> None:
        self.notes.append(message)

    # Closing

    def audit(self) -> None:
        """Fails for every output, gradient and gradient file that nobody compared."""
        done = {row.name for row in self.rows} | set(self.left_out)
        wanted = [*self.case.named("output"), *self.case.named("grad"), *self.case.gradient_files()]
        for name in wanted:
            if name not in done:
                self.fail(f"{name}: never compared")
        for name in self.left_out:
            if name in wanted and not name.startswith("tie."):
                self.fail(f"{name}: left out, but only tie.* is optional")
        for name in self.case.unlisted():
            self.fail(f"{name}: in io.npz, but case.json does not say what it is")

    @property
    def passed(self) -> bool:
        return bool(self.rows) and not self.failed and not self.unbuilt

    @property
    def failed(self) -> bool:
        """Whether anything that was compared, or should have been, is wrong."""
        return bool(self.failures) or not all(row.passed for row in self.rows)

    @property
    def compared(self) -> int:
        """Arrays compared (each parameter of a gradient file is one)."""
        return sum(not row.name.endswith(".safetensors") for row in self.rows)

    @property
    def largest(self) -> tuple[float, float]:
        """(relative, absolute) largest difference."""
        return (
            max((row.relative for row in self.rows), default=0.0),
            max((row.absolute for row in self.rows), default=0.0),
        )

    def _shapes(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> bool:
        if ours.shape == theirs.shape:
            return True
        self._add(Row(name, np.inf, np.inf, False, f"shape {ours.shape}, reference {theirs.shape}"))
        return False

    def _mark(self, file: str) -> None:
        self._add(Row(file, 0.0, 0.0, True))

    def _add(self, row: Row) -> None:
        self.rows.append(row)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
