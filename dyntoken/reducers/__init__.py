"""Published methods as rows of one table: Score x Select x Fuse."""

from __future__ import annotations

import dataclasses
from typing import Any

from dyntoken.ops.fuse import FUSERS
from dyntoken.reducers.base import Reducer, ScoreSelectFuse
from dyntoken.reducers.score import SCORERS
from dyntoken.registry import Table, UnknownNameError, check_options, suggest

__all__ = ["METHODS", "Method", "Reducer", "ScoreSelectFuse", "make_reducer", "method"]


@dataclasses.dataclass(frozen=True)
class Method:
    """How a published method is put together.

    Attributes:
      make: the reducer class.
      options: its fields.
      inside: the site is between attention and MLP, else before the block.
      relative: a keep rate refers to the current tokens and rounds up (EViT),
        else to the first patch count and rounds down (DynamicViT).
      source: paper and repository it follows.
    """

    make: type[Reducer]
    options: tuple[tuple[str, Any], ...]
    inside: bool
    relative: bool
    source: str

    @property
    def fused(self) -> bool:
        """Whether each site appends one fused token."""
        return dict(self.options).get("fuse") == "one_token"


def _row(score: str, fuse: str, source: str, **more: Any) -> Method:
    early = score == "class_attention"
    options = {"score": score, "fuse": fuse, **more}
    return Method(
        ScoreSelectFuse, tuple(sorted(options.items())), inside=early, relative=early, source=source
    )


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
    Class-attention scores move the site inside the block.

    Raises:
      UnknownNameError: unknown method, option, scorer or fusing rule.
    """
    row = METHODS[name]
    fields = {f.name for f in dataclasses.fields(row.make)} - {"keep", "current", "ratio", "form", "stage"}
    check_options(f"method {name!r}", options, fields - {"parent", "name"})
    if options.get("score") == "shuffled":
        options = {**options, "score": dict(row.options)["score"], "shuffle": True}
    merged = {**dict(row.options), **options}
    for kind, table in (("score", SCORERS), ("fuse", FUSERS)):
        if kind in merged and merged[kind] not in table:
            known = [*table, *(["shuffled"] if kind == "score" else [])]
            raise UnknownNameError(f"unknown {kind} {merged[kind]!r}: {suggest(str(merged[kind]), known)}")
    inside = row.inside or merged.get("score") == "class_attention"
    return dataclasses.replace(row, options=tuple(sorted(merged.items())), inside=inside)


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
