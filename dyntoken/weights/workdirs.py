"""Which checkpoint of a workdir is meant: the newest, the best, or one by its step.

A run records its evaluations in `metrics.jsonl`; which checkpoint is the best
follows from there, so that the last evaluation counts, too, which comes after
the last checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

CHECKPOINTS, METRICS, CONFIG = "checkpoints", "metrics.jsonl", "config.json"
DEFAULT_METRIC = "top1"


class NoCheckpointError(ValueError):
    """No such checkpoint; one line with those there are."""


def read_rows(path: epath.Path) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`; [] without one, and without a half-written last line."""
    if not path.exists():
        return []
    return [row for row in map(_parse, path.read_text().splitlines()) if row is not None]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row and "kind" in row else None


def score(metric: str, metrics: Mapping[str, Any]) -> float | None:
    """A metric of one evaluation so that higher is better: losses are negated, NaN is the worst.

    None if the evaluation has no such metric.
    """
    value = metrics.get(metric)
    if value is None:
        return None
    value = -float(value) if metric.rsplit("/", 1)[-1] == "loss" else float(value)
    return -math.inf if math.isnan(value) else value


def scores(rows: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Step -> `score` of the evaluations in `rows`; of a step evaluated twice the later one."""
    found = {row["step"]: score(metric, row) for row in rows if row["kind"] == "eval"}
    return {step: value for step, value in found.items() if value is not None}


def by_rank(scored: Mapping[int, float]) -> list[int]:
    """Steps, the best first; of equal ones the later."""
    return sorted(scored, key=lambda step: (scored[step], step), reverse=True)


def candidates(workdir: epath.Path, steps: Iterable[int], which: int | str = "newest") -> list[int]:
    """The checkpoints to try, in order.

    Args:
      workdir: folder of the run.
      steps: of the checkpoints there are.
      which: "newest"; "best", by the run's `best_metric`; or a step.

    Raises:
      NoCheckpointError: no such step, or no evaluation of any checkpoint.
    """
    steps = sorted(steps, reverse=True)
    if which == "newest":
        return steps
    listed = ", ".join(map(str, reversed(steps))) or "none"
    if which != "best":
        if not str(which).isdigit():
            raise NoCheckpointError(f"step={which!r}: choose newest, best or one of the steps {listed}")
        if int(which) not in steps:
            raise NoCheckpointError(f"{workdir} has no checkpoint of step {which}; it has: {listed}")
        return [int(which)]
    config = workdir / CONFIG
    given = json.loads(config.read_text()) if config.exists() else {}
    metric = given.get("best_metric", DEFAULT_METRIC)
    found = scores(read_rows(workdir / METRICS), metric)
    ranked = by_rank({step: found[step] for step in steps if step in found})
    if not ranked:
        raise NoCheckpointError(
            f"{workdir} has no evaluation of {metric!r} at a checkpoint ({listed}): a run with "
            "keep_best > 0 saves where it evaluates; or give a step"
        )
    return ranked
