"""The learning curves of a run: losses and accuracy against the step.

Needs matplotlib (`pip install matplotlib`), imported on first use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dyntoken.analysis.figures import INK, matplotlib
from dyntoken.analysis.plot import COLOURS

SIDE = ("step", "kind", "lr", "images_per_s", "seconds", "data_wait", "grad_norm", "update_norm")
MARKERS = "os^Dv"  # one per evaluated set, in both pictures
Rows = Sequence[Mapping[str, Any]]


def learning_curves(rows: Rows, *, title: str) -> Any:
    """A matplotlib `Figure` of what a run has recorded so far.

    Left the losses of training and evaluation, right the top-1 accuracy of
    every evaluated set, the average of the weights dashed, the best point of
    each curve in the legend. Of a model with exits its last one.

    Args:
      rows: of `metrics.jsonl`: `step`, `kind` ("train" or "eval") and values.
      title: above both.

    Raises:
      ValueError: no rows.
      ModuleNotFoundError: matplotlib is absent; the message says what to install.
    """
    if not rows:
        raise ValueError("no curve to draw: the run has recorded nothing")
    figure = matplotlib("figure").Figure(figsize=(11, 4.4), dpi=120, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    train, held_out = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    _losses(left, train, held_out)
    _accuracies(right, held_out)
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(color="#e4e4e4", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines["top"].set_visible(False)
        axis.spines["right"].set_visible(False)
        axis.set_xlim(0, max(row["step"] for row in rows) * 1.02)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8.5, frameon=False)
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def _losses(axis: Any, train: Rows, held_out: Rows) -> None:
    axis.set_ylabel("loss")
    names = [name for name in _names(train) if name not in SIDE]
    # `loss` is the weighted total: of a single loss of weight 1 the same curve again.
    if len(names) == 2 and "loss" in names and _points(train, names[0])[1] == _points(train, names[1])[1]:
        names = ["loss"]
    for colour, name in zip(COLOURS, sorted(names, key=lambda name: name != "loss"), strict=False):
        wide = 1.6 if name == "loss" else 1.0
        axis.plot(*_points(train, name), color=colour, linewidth=wide, label=f"{name}, training")
    names = [name for name in _names(held_out) if name.rsplit("/", 1)[-1] == "loss"]
    sets = list(dict.fromkeys(map(_set_of, names)))
    for name in names:
        dashes = "--" if "ema" in name.split("/") else "-"
        axis.plot(
            *_points(held_out, name),
            color=INK,
            linestyle=dashes,
            linewidth=1.0,
            marker=MARKERS[sets.index(_set_of(name)) % len(MARKERS)],
            markersize=3.2,
            label=f"{name}, evaluation",
        )


def _accuracies(axis: Any, held_out: Rows) -> None:
    axis.set_ylabel("top-1 accuracy (%)")
    names = [name for name in _names(held_out) if name.rsplit("/", 1)[-1] == "top1"]
    sets = list(dict.fromkeys(map(_set_of, names)))
    for name in names:
        steps, values = _points(held_out, name)
        best = max(range(len(values)), key=lambda index: values[index])
        axis.plot(
            steps,
            [100 * value for value in values],
            color=COLOURS[sets.index(_set_of(name)) % len(COLOURS)],
            linestyle="--" if "ema" in name.split("/") else "-",
            linewidth=1.4,
            marker=MARKERS[sets.index(_set_of(name)) % len(MARKERS)],
            markersize=3.2,
            label=f"{name}  best {100 * values[best]:.2f} at {steps[best]}",
        )


def _set_of(name: str) -> str:
    """`"v2"` of `"v2/ema/top1"`, `""` of `"ema/top1"`."""
    return "/".join(part for part in name.split("/")[:-1] if part != "ema")


def _names(rows: Rows) -> list[str]:
    """Every single-valued name, in the order of appearance."""
    return list(dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, (int, float))))


def _points(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]
