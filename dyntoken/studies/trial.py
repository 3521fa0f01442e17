"""What a study is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Trial:
    """One network of a study, trained once per seed.

    Attributes:
      name: of its rows and its folder: a word.
      method: row of `reducers.METHODS`; None: the dense model.
      keep: of the method.
      cost_of: in place of `keep`: whatever costs as much as this keep rate of dTPS at the sites of the study.
      at: blocks of its sites; None: those of the study, or the method's own where it has a site at every block.
      model: further keywords of `create_model`; with "name" a model of another kind, from the same weights.
      losses: loss -> options, beside those of the recipe; None in their place takes one away.
      length: factor on the steps of the recipe; 0: the dense weights as they are.
      series: line of the picture; the name, if none is given.
      group: rows that are compared with each other.
    """

    name: str
    method: str | None = None
    keep: float | None = None
    cost_of: float | None = None
    at: tuple[int, ...] | None = None
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    losses: Mapping[str, Mapping[str, Any] | None] = dataclasses.field(default_factory=dict)
    length: float = 1.0
    series: str = ""
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """A question, and the networks that answer it.

    Attributes:
      title: of the table and the picture.
      expects: what was expected before the first run, in words.
      trials: from the `setting.Setting` to the networks.
      measure: row of `measures.MEASURES`.
      expected: row -> top-1 minus that of the dense model, in points, as guessed before the first run.
    """

    title: str
    expects: str
    trials: Callable[[Any], Sequence[Trial]]
    measure: str = "top1"
    expected: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one network, or of one way to run it.

    Attributes:
      name, series, group: see `Trial`.
      values: "top1" (fraction) and "gmacs" among others.
    """

    name: str
    series: str
    group: str
    values: Mapping[str, float]
