"""What a run is evaluated on: the split of `config.data`, and any number of further sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dyntoken import data
from dyntoken.data.info import class_difference
from dyntoken.data.splits import parse_split
from dyntoken.registry import UnknownNameError, suggest
from dyntoken.train.settings import DataSettings, EvalSettings

MAIN = ""  # the label of the set that `config.data` names


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """A set that is there, with the arguments of `data.eval_batches` that are its own."""

    info: data.DataInfo
    arguments: Mapping[str, Any]


def open_eval_sets(
    chosen: DataSettings, info: data.DataInfo, entries: Mapping[str, EvalSettings]
) -> dict[str, EvalSet]:
    """Every evaluation set by its label, `MAIN` first; reads no image.

    Args:
      chosen: the section `config.data`.
      info: of its data set.
      entries: `config.evals`.

    Raises:
      ValueError: a set of other classes or channels, or no such split.
    """
    reading = {key: value for key, value in chosen.eval.items() if key != "batch"}
    main = {"name": chosen.name, "split": chosen.eval_split, "data_dir": chosen.data_dir}
    sets = {MAIN: EvalSet(info, {**main, **reading, **chosen.options})}
    for label, entry in entries.items():
        where = entry.data_dir or chosen.data_dir
        other = data.info(entry.name, where, **entry.options)
        for what in ("num_classes", "channels"):
            here, there = getattr(other, what), getattr(info, what)
            if here != there:
                raise ValueError(
                    f"config.evals.{label}: {entry.name} has {here} {what.removeprefix('num_')}, the model is "
                    f"trained on {there} ({chosen.name}): name a set of the same classes"
                )
        if difference := class_difference(entry.name, other.class_names, chosen.name, info.class_names):
            raise ValueError(
                f"config.evals.{label}: {difference}: name a set of the same classes in the same order"
            )
        own = {"name": entry.name, "split": entry.split, "data_dir": where}
        sets[label] = EvalSet(other, {**own, **reading, **entry.eval, **entry.options})
    for label, one in sets.items():
        try:
            parse_split(one.arguments["name"], one.arguments["split"], one.info.splits)
        except data.DataError as error:
            key = f"evals.{label}.split" if label else "data.eval_split"
            others = [split for split in one.info.splits if split != chosen.split] or ["train[90%:]"]
            raise data.DataError(f"{error} (--config.{key}={others[0]})") from error
    return sets


def check_metric(name: str, sets: Mapping[str, EvalSet], *, ema: bool) -> None:
    """Raises `UnknownNameError` unless evaluations have the metric `best_metric`."""
    values = ("top1", "top5", "loss") if sets[MAIN].info.num_classes > 5 else ("top1", "loss")
    prefixes = [f"{label}/" if label else "" for label in sets]
    kinds = ("", "ema/") if ema else ("",)
    known = [f"{prefix}{kind}{value}" for prefix in prefixes for kind in kinds for value in values]
    if name not in known:
        raise UnknownNameError(
            f"config.best_metric is {name!r}, which is not measured: {suggest(name, known)}"
        )
