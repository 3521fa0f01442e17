"""Fusing rules by name, with what each declares; the arithmetic is in `ops.fuse`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dyntoken.ops import fuse
from dyntoken.registry import Table, check_call


@dataclasses.dataclass(frozen=True)
class Fuser:
    """A row of `FUSERS`.

    Attributes:
      fn: see `register_fuser`.
      adds_row: it returns one more row (`Fused.extra`), which later sites count.
      merges: it puts dropped rows into kept ones (`Fused.host`).
      protects: no later site drops the rows that it added.
      reads: options of a method that it understands, of those of the squeeze.
    """

    fn: Callable[..., fuse.Fused]
    adds_row: bool = False
    merges: bool = False
    protects: bool = False
    reads: tuple[str, ...] = ()


FUSERS = Table(
    "fuse",
    {
        "drop": Fuser(fuse.drop),
        "one_token": Fuser(fuse.one_token, adds_row=True),
        "package": Fuser(fuse.package, adds_row=True, protects=True),
        "package_sum": Fuser(fuse.package_sum, adds_row=True, protects=True),
        "mean": Fuser(fuse.mean, merges=True, reads=("similarity", "measure")),
        "squeeze": Fuser(fuse.squeeze, merges=True, reads=("similarity", "measure", "temperature", "weight")),
    },
)


def register_fuser(
    name: str,
    fn: Callable[..., fuse.Fused],
    *,
    adds_row: bool = False,
    merges: bool = False,
    protects: bool = False,
) -> None:
    """Adds a fusing rule: a value of `fuse=`.

    Args:
      name: of the rule.
      fn: `fn(targets [B, T, C], sources [B, S, C], *, importance [B, S], allowed,
        weight, same, temperature, normalize) -> dyntoken.Fused`, see `ops.fuse`; a
        rule takes what it does not read as `**_`. `normalize` is False with `measure="dot"`.
      adds_row: it returns `extra`, one row for all that is dropped.
      merges: it returns `host`, the kept row that absorbs each dropped one.
      protects: later sites keep the rows that it added.

    Raises:
      ValueError: a name that is taken, or a function of other arguments.
    """
    roles = ("importance", "allowed", "weight", "same", "temperature", "normalize")
    check_call(f"fuse {name!r}", fn, "targets", "sources", **dict.fromkeys(roles))
    FUSERS.register(name, Fuser(fn, adds_row, merges, protects, ("temperature", "measure")))
