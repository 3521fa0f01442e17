"""What is known of a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dyntoken.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a model and a trainer want to know of a data set.

    Attributes:
      name: as it was asked for.
      num_classes: number of labels, `0 .. num_classes - 1`.
      image_shape: `(H, W, C)`, or None where images differ in size.
      splits: split name -> number of examples.
      mean, std: per channel, of pixels scaled to [0, 1].
      class_names: one per class, or () where the source names none.
      several_labels: evaluation batches hold `labels` besides `label`.
      channels: colour channels of the batches.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int] | None
    splits: Mapping[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    several_labels: bool = False

    @property
    def channels(self) -> int:
        return len(self.mean)


def class_difference(here: str, names: Sequence[str], there: str, others: Sequence[str]) -> str | None:
    """What two sides' class names do not share, as the end of a sentence; None if nothing.

    Compared in the order of the labels, without spaces; a side that names none is not compared.
    """
    mine, other = (["".join(name.split()) for name in side] for side in (names, others))
    if not mine or not other or mine == other:
        return None
    pairs = zip(mine, other, strict=False)
    at = next((label for label, (one, two) in enumerate(pairs) if one != two), None)
    if at is None:
        said = [f"{here} has {len(names)} classes, {there} {len(others)}"]
    else:
        said = [f"label {at} is {names[at]!r} in {here} and {others[at]!r} in {there}"]
    alone = [
        (where, [name for name in own if name not in rest])
        for where, own, rest in ((here, mine, other), (there, other, mine))
    ]
    said += [f"only {where} has {list_names(missing)}" for where, missing in alone if missing]
    return ("" if len(said) > 1 else "the order differs: ") + "; ".join(said)


def list_names(names: Sequence[str]) -> str:
    """The first five, quoted."""
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def check_labels(labels: np.ndarray, name: Callable[[int], Any], info: DataInfo) -> None:
    """Raises `DataError` for a label outside the classes; `name(row)` says whose it is."""
    wrong = np.flatnonzero((labels < 0) | (labels >= info.num_classes))
    if len(wrong):
        raise DataError(
            f"data set {info.name!r}: example {name(wrong[0])} has label {labels[wrong[0]]}, but the classes are "
            f"0 .. {info.num_classes - 1}: repair it, or leave its split out (-1 is what unlabelled ones carry)"
        )
