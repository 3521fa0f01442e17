"""What a cascade is asked for, checked: one clear line for each thing that is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dyntoken.registry import UnknownNameError, suggest

OF_TRUNK = ("embed", "blocks", "stages", "relations")  # records of the backbone
RECORDS = ("features", *OF_TRUNK, "context", "maps", "biases")
# Fields that only one of the reuses reads, with their defaults.
OF_REUSE = {
    "feature_reuse": {
        "feature_source": "last",
        "feature_class_token": False,
        "feature_layers": "all",
        "feature_norm": True,
    },
    "relation_reuse": {
        "relation_source": "all",
        "relation_mixer": "mlp",
        "relation_resize": "grid",
        "relation_chunks": 1,
    },
}
ONE_BACKBONE = ("depth", "heads", "width", "mlp_ratio")


def exits(model: Any) -> None:
    """Raises ValueError for exits that make no cascade."""
    given = model.exits
    if not isinstance(given, tuple) or not all(_is_grid(tokens) for tokens in given):
        raise ValueError(
            f"exits={given!r}: give the token grid of each exit as n or (rows, columns), as in exits=(7, 10, 14)"
        )
    if not given:
        raise ValueError("exits is empty: give the token grid of each exit, as in exits=(7, 10, 14)")
    for old, new in itertools.pairwise(model.grids):
        if new == old or new[0] < old[0] or new[1] < old[1]:
            raise ValueError(f"exits={given}: each exit needs a finer token grid than the one before")


def _is_grid(tokens: Any) -> bool:
    sides = tokens if isinstance(tokens, tuple) else (tokens, tokens)
    return len(sides) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in sides)


def one_backbone(options: Mapping[str, Any]) -> None:
    """Raises ValueError where a field of the backbone is given per exit."""
    for name in ONE_BACKBONE:
        if isinstance(options.get(name), (tuple, list)):
            raise ValueError(
                f"{name}={options[name]}: the exits of a cascade share one backbone, since relation reuse "
                "adds their attention logits block by block and head by head; give one number"
            )


def switches(model: Any) -> None:
    """Raises ValueError for fields that do not fit together."""
    if dict(model.backbone.options).get("distilled"):
        raise ValueError("a cascade distils from its own last exit: build it without distilled=True")
    for reuse, fields in OF_REUSE.items():
        changed = [name for name, default in fields.items() if getattr(model, name) != default]
        if changed and not getattr(model, reuse):
            raise ValueError(f"{changed[0]} says how {reuse} works, which is off: leave it out")
    if model.feature_reuse and min(model.context_width, model.context_hidden) < 1:
        raise ValueError(
            "context_width and context_hidden must be at least 1; feature_reuse=False needs none"
        )
    if model.feature_class_token and not model.plain().prefix:
        raise ValueError("feature_class_token=True needs a backbone with a class token")


def per_exit(name: str, value: Any, exits: int) -> tuple[Any, ...]:
    """One entry per exit: of a tuple that holds a tuple its entries, else `value` for each.

    Raises:
      ValueError: another number of entries than exits.
    """
    if not isinstance(value, (tuple, list)) or not any(isinstance(v, (tuple, list)) for v in value):
        return (value,) * exits
    if len(value) != exits:
        raise ValueError(
            f"{name}={value} has {len(value)} entries for {exits} exits: give one per exit, or one for all"
        )
    return tuple(value)


def by_exit(name: str, arrays: Sequence[Any] | None, counts: Sequence[int]) -> list[Any]:
    """Arrays per site, cut where a new exit begins.

    Args:
      counts: number of sites of each exit.

    Raises:
      ValueError: another number of arrays than sites.
    """
    if arrays is None:
        return [None] * len(counts)
    if len(arrays) != sum(counts):
        raise ValueError(f"{name} has {len(arrays)} entries for {sum(counts)} sites, exit after exit")
    ends = list(itertools.accumulate(counts))
    return [arrays[end - count : end] for end, count in zip(ends, counts, strict=True)]


def records(names: Sequence[str]) -> None:
    """Raises UnknownNameError for a record that no exit keeps."""
    for what in names:
        if what not in RECORDS:
            raise UnknownNameError(f"unknown record {what!r}: {suggest(what, RECORDS)}")


def upto(asked: int | None, last: int, exits: int) -> None:
    """Raises ValueError for an exit that is none."""
    if not 0 <= last < exits:
        raise ValueError(f"upto={asked}: this cascade has the exits 0 to {exits - 1}")
