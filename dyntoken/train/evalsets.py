"""What a run is evaluated on: the split of `config.data`, and any number of further sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from dyntoken import data, schema
from dyntoken.data.info import class_difference
from dyntoken.data.splits import parse_split
from dyntoken.registry import UnknownNameError, suggest
from dyntoken.schema import Section

if TYPE_CHECKING:
    from dyntoken.train.settings import DataSettings

MAIN = ""  # the label of the set that `config.data` names
EVAL_OWN = ("split", "size", "shards", "process", "data_dir")  # of `data.eval_batches`, set by the trainer
READING = Section(lambda given, around: schema.keywords(data.eval_batches, but=(*EVAL_OWN, "batch")))
SOURCE = Section(lambda given, around: _of_source(given, str(around.get("name", ""))))


def _of_source(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options of a data set; any of one that may not exist, which is said where it is opened."""
    sure = name in data.SOURCES or name.startswith("folder:")
    return {**({} if sure else dict.fromkeys(given, Any)), **data.source_options(name)}


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """One entry of `config.evals`; images are resized and normalised as those of `config.data`.

    Attributes:
      name: see `dyntoken.data`.
      split: TFDS spelling.
      data_dir: where TFDS data lies; None: where `config.data` has it.
      eval: arguments of `data.eval_batches` that differ from `config.data.eval`.
      options: of the source.
    """

    name: str
    split: str | Sequence[str] = "test"
    data_dir: str | None = None
    eval: Annotated[Mapping[str, Any], READING] = dataclasses.field(default_factory=dict)
    options: Annotated[Mapping[str, Any], SOURCE] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """A set that is there, with the arguments of `data.eval_batches` that are its own."""

    info: data.DataInfo
    arguments: Mapping[str, Any]


def check_labels(labels: Iterable[str]) -> None:
    """Raises ValueError for a label of `config.evals` that is no prefix of a metric."""
    for label in labels:
        if not label or "/" in label or label == "ema":
            raise ValueError(f"config.evals has the label {label!r}: use a word without '/', not 'ema'")


def open_sets(
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
        found = data.info(entry.name, where, **entry.options)
        for what, here, there in (
            ("classes", found.num_classes, info.num_classes),
            ("channels", found.channels, info.channels),
        ):
            if here != there:
                raise ValueError(
                    f"config.evals.{label}: {entry.name} has {here} {what}, the model is trained on {there} "
                    f"({chosen.name}): name a set of the same classes"
                )
        if other := class_difference(entry.name, found.class_names, chosen.name, info.class_names):
            raise ValueError(
                f"config.evals.{label}: {other}: name a set of the same classes in the same order"
            )
        own = {"name": entry.name, "split": entry.split, "data_dir": where}
        sets[label] = EvalSet(found, {**own, **reading, **entry.eval, **entry.options})
    for one in sets.values():
        parse_split(one.arguments["name"], one.arguments["split"], one.info.splits)
    return sets


def check_metric(name: str, sets: Mapping[str, EvalSet], *, ema: bool) -> None:
    """Raises `UnknownNameError` unless evaluations have the metric `best_metric`."""
    kinds = ("", "ema/") if ema else ("",)
    values = ("top1", "top5", "loss") if sets[MAIN].info.num_classes > 5 else ("top1", "loss")
    known = [
        f"{f'{label}/' if label else ''}{kind}{value}" for label in sets for kind in kinds for value in values
    ]
    if name not in known:
        raise UnknownNameError(
            f"config.best_metric is {name!r}, which is not measured: {suggest(name, known)}"
        )
