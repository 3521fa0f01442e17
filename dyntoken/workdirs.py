"""What lies in the folder of a run, and which of its checkpoints is meant: the newest, the best, or a step.

A run records its evaluations in `metrics.jsonl`; which checkpoint is the best follows from there, so that
the last evaluation counts, too, which comes after the last checkpoint. The others are in the description of
each later checkpoint as well: a record that is lost or damaged loses the last one only.
"""

from __future__ import annotations

import contextlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

Log = Callable[[str], None]
FOLDER, METRICS, CONFIG = "checkpoints", "metrics.jsonl", "config.json"
META = "meta/metadata"  # of a checkpoint
DEFAULT_METRIC = "top1"


class CheckpointError(ValueError):
    """No checkpoint can be used; one line that says why and what to do."""


def checksum(meta: Mapping[str, Any]) -> int:
    """CRC-32 of the description of a checkpoint."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def numbered(where: epath.Path) -> list[int]:
    """The steps that have a folder there."""
    return [int(entry.name) for entry in where.iterdir() if entry.name.isdigit()] if where.is_dir() else []


def read_meta(step_folder: epath.Path) -> dict[str, Any]:
    """The description of a checkpoint, {} if it is absent or not what was written."""
    try:
        meta = json.loads((step_folder / META).read_text())
        written = meta.pop("checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return meta if checksum(meta) == written else {}


def step_folder(path: epath.Path, step: int | str = "newest") -> epath.Path:
    """The folder of one checkpoint of a workdir, of its `checkpoints`, or this folder itself if it is one.

    Raises:
      CheckpointError: no finished checkpoint, or no such one.
    """
    root = path / FOLDER if (path / FOLDER).is_dir() else path
    if (root / "state").exists() or (root / "_METADATA").exists():
        return root
    steps = [number for number in numbered(root) if (root / str(number)).is_dir()]
    if not steps:
        raise CheckpointError(
            f"{path}: no finished checkpoint; expected a workdir with checkpoints/<step>/ in it"
        )
    return root / str(candidates(root.parent if root.name == FOLDER else root, steps, step)[0])


def candidates(workdir: epath.Path, steps: Iterable[int], which: int | str = "newest") -> list[int]:
    """The checkpoints to try, in order.

    Args:
      which: "newest"; "best", by the run's `best_metric`; or a step.

    Raises:
      CheckpointError: no such step, or no evaluation of any checkpoint.
    """
    steps = sorted(steps, reverse=True)
    if which == "newest":
        return steps
    listed = ", ".join(map(str, reversed(steps))) or "none"
    if which != "best":
        if not str(which).isdigit():
            raise CheckpointError(f"step={which!r}: choose newest, best or one of the steps {listed}")
        if int(which) not in steps:
            raise CheckpointError(f"{workdir} has no checkpoint of step {which}; it has: {listed}")
        return [int(which)]
    metas = [read_meta(workdir / FOLDER / str(step)) for step in steps]
    metric = _best_metric(workdir, metas)
    found = scores(read_rows(workdir / METRICS), metric)
    for meta in metas:  # the newest first
        found = kept_scores(meta, metric) | found
    ranked = by_rank({step: found[step] for step in steps if step in found})
    if not ranked:
        raise CheckpointError(
            f"{workdir} has no evaluation of {metric!r} at a checkpoint ({listed}): a run with "
            "keep_best > 0 saves where it evaluates; or give a step"
        )
    return ranked


def _best_metric(workdir: epath.Path, metas: Iterable[Mapping[str, Any]]) -> str:
    """What the run ranks by: of its config.json, else of its newest checkpoint."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        given = json.loads((workdir / CONFIG).read_text())["best_metric"]
        if isinstance(given, str):
            return given
    return next((meta["scores"]["metric"] for meta in metas if "scores" in meta), DEFAULT_METRIC)


def read_rows(path: epath.Path, log: Log = lambda line: None) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`; [] without one, and without a half-written last line.

    Other lines that are no rows are left out, and `log` is told once how many.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = [_row(line) for line in lines if line.strip()]
    bad = sum(row is None for row in rows) - bool(lines[-1].strip() and _row(lines[-1]) is None)
    if bad:
        log(f"{bad} damaged line(s) in {path}: left out")
    return [row for row in rows if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):  # also what is not UTF-8
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("kind"), str):
        return None
    return row


def score(metric: str, metrics: Mapping[str, Any]) -> float | None:
    """A metric of one evaluation so that higher is better: losses are negated, NaN is the worst.

    None if the evaluation has no such metric.
    """
    value = metrics.get(metric)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    value = -float(value) if metric.rsplit("/", 1)[-1] == "loss" else float(value)
    return -math.inf if math.isnan(value) else value


def scores(rows: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Step -> `score` of the evaluations in `rows`; of a step evaluated twice the later one."""
    found = {row["step"]: score(metric, row) for row in rows if row["kind"] == "eval"}
    return {step: value for step, value in found.items() if value is not None}


def kept_scores(meta: Mapping[str, Any], metric: str) -> dict[int, float]:
    """Step -> `score` of the evaluations before a checkpoint, if they are of this metric."""
    kept = meta.get("scores", {})
    values = kept.get("values", {}) if kept.get("metric") == metric else {}
    return {int(step): -math.inf if value is None else value for step, value in values.items()}


def by_rank(scored: Mapping[int, float]) -> list[int]:
    """Steps, the best first; of equal ones the later."""
    return sorted(scored, key=lambda step: (scored[step], step), reverse=True)
