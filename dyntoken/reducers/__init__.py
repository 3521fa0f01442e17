"""Published methods as rows of one table: Score x Select x Fuse."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from dyntoken import architectures
from dyntoken.reducers.base import Reducer, ScoreSelectFuse
from dyntoken.reducers.fuse import FUSERS, register_fuser
from dyntoken.reducers.score import SCORERS, VARIANTS, Scores, check_declared, register_scorer
from dyntoken.registry import Table, UnknownNameError, check_options, suggest

__all__ = [
    "FUSERS",
    "METHODS",
    "SCORERS",
    "Method",
    "Reducer",
    "ScoreSelectFuse",
    "Scores",
    "make_reducer",
    "method",
    "register_fuser",
    "register_method",
    "register_scorer",
]


@dataclasses.dataclass(frozen=True)
class Method:
    """How a published method is put together.

    Attributes:
      make: the reducer class.
      options: its fields.
      published: where its sites lie as published, see `Reducer.where`; another
        scorer leaves them there, if it can work there.
      source: paper and repository it follows.
    """

    make: type[Reducer]
    options: tuple[tuple[str, Any], ...]
    published: str
    source: str

    @classmethod
    def of(cls, make: type[Reducer], source: str, **options: Any) -> Method:
        """The row of a reducer class with these fields."""
        return cls(make, tuple(sorted(options.items())), make(keep=1, parent=None, **options).where, source)

    @functools.cached_property
    def plain(self) -> Reducer:
        """The reducer as a free-standing module, to read what it declares."""
        return self.make(keep=1, parent=None, **dict(self.options))

    @property
    def inside(self) -> bool:
        """Whether sites lie between attention and MLP, else before the block."""
        return "inside" in (self.published, self.plain.where)

    @property
    def relative(self) -> bool:
        """Whether a keep rate refers to the current tokens and rounds up (EViT).

        Else it refers to the first patch count and rounds down (DynamicViT).
        """
        return self.published == "inside"


def _row(score: str, fuse: str, source: str) -> Method:
    return Method.of(ScoreSelectFuse, source, score=score, fuse=fuse)


METHODS = Table(
    "method",
    {
        "dynamicvit": _row("predictor", "drop", "DynamicViT, NeurIPS 2021; raoyongming/DynamicViT"),
        "dtps": _row("predictor", "squeeze", "TPS, CVPR 2023; megvii-research/TPS-CVPR2023"),
        "evit": _row("class_attention", "one_token", "EViT, ICLR 2022; youweiliang/evit"),
        "topk": _row("class_attention", "drop", "EViT without its fused token; youweiliang/evit"),
        "etps": _row("class_attention", "squeeze", "TPS, CVPR 2023, as its authors describe it"),
    },
)


def method(name: str, /, **options: Any) -> Method:
    """A row of `METHODS` with some options replaced.

    `score="shuffled"` keeps the method's own scorer and permutes its scores.
    Scores that need a block's attention move the site inside the block.

    Raises:
      UnknownNameError: unknown method, option, scorer or fusing rule.
    """
    row = METHODS[name]
    check_options(f"method {name!r}", options, _fields(row.make))
    own = dict(row.options)
    if issubclass(row.make, ScoreSelectFuse):
        if options.get("score") in VARIANTS:
            options = {**options, "score": own["score"], **VARIANTS[options["score"]]}
        for kind, known in (("score", [*SCORERS, *VARIANTS]), ("fuse", FUSERS)):
            if kind in options and options[kind] not in known:
                wrong = options[kind]
                raise UnknownNameError(f"unknown {kind} {wrong!r}: {suggest(str(wrong), known)}")
    return dataclasses.replace(row, options=tuple(sorted({**own, **options}.items())))


def register_method(
    name: str, make: type[Reducer] = ScoreSelectFuse, /, *, source: str = "", **options: Any
) -> None:
    """Adds a method, the first part of a model's name: a choice of rules, or a `Reducer` of its own.

    Args:
      name: of the method.
      make: the reducer class; what it declares decides where its sites lie.
      source: paper and repository it follows.
      **options: its fields, as `score` and `fuse`.

    Raises:
      UnknownNameError: no such field, scorer or fusing rule.
      ValueError: a name that is taken, no reducer class, or declarations that
        contradict each other.
    """
    if not (isinstance(make, type) and issubclass(make, Reducer)):
        raise ValueError(f"method {name!r} must be a subclass of dyntoken.Reducer, got {make!r}")
    check_options(f"method {name!r}", options, _fields(make))
    if name.partition("_")[0] in (architectures.CASCADE, architectures.MULTIEXIT):
        raise ValueError(f"method {name!r}: names of models with exits begin like this, choose another name")
    row = Method.of(make, source, **options)
    check_declared(f"method {name!r}", row.plain.needs, row.published)
    METHODS.register(name, row)


def _fields(make: type[Reducer]) -> set[str]:
    """Fields of a reducer that its sites do not decide."""
    decided = {"keep", "current", "ratio", "form", "stage", "parent", "name"}
    return {field.name for field in dataclasses.fields(make)} - decided


def make_reducer(preset: str, /, *, keep: int, form: str = "auto", **options: Any) -> Reducer:
    """One reducer for a ViT of your own.

    Args:
      preset: row of `METHODS`.
      keep: static number of patch tokens that stay.
      form: "auto", "mask" or "gather".
      **options: replace the method's own (`fuse="mean"`) or set `Reducer`
        fields (`stage=1`, `name="reducer_1"`).

    Returns:
      A linen module; call it as `reducer(tokens, seen, train)` with
      `Tokens.start(x, prefix=1, grid=(14, 14))`.
    """
    fields = {k: options.pop(k) for k in ("current", "ratio", "stage", "name") if k in options}
    row = method(preset, **options)
    return row.make(keep=keep, form=form, **fields, **dict(row.options))
