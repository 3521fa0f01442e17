"""The learning curves of a run: losses and accuracy against the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dyntoken.analysis import figures
from dyntoken.analysis.figures import COLOURS, INK

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
    figure = figures.figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    train, held_out = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    names = [name for name in _names(train) if name not in SIDE]
    # `loss` is the weighted total: of a single loss of weight 1 the same curve again.
    if len(names) == 2 and "loss" in names and _points(train, names[0])[1] == _points(train, names[1])[1]:
        names = ["loss"]
    for colour, name in zip(COLOURS, sorted(names, key=lambda name: name != "loss"), strict=False):
        wide = 1.6 if name == "loss" else 1.0
        found = _points(train, name)
        alone = "." if len(found[0]) == 1 else ""  # a line of one point would not be seen
        left.plot(*found, color=colour, linewidth=wide, marker=alone, label=f"{name}, training")
    for name, _, style in _evaluated(held_out, "loss"):
        style |= {"color": INK, "linewidth": 1.0, "label": f"{name}, evaluation"}
        left.plot(*_points(held_out, name), **style)
    for name, index, style in _evaluated(held_out, "top1"):
        steps, values = _points(held_out, name)
        values = [100 * value for value in values]
        best = max(range(len(values)), key=values.__getitem__)
        style |= {"color": COLOURS[index % len(COLOURS)], "linewidth": 1.4}
        right.plot(steps, values, label=f"{name}  best {values[best]:.2f} at {steps[best]}", **style)
    for axis, what in ((left, "loss"), (right, "top-1 accuracy (%)")):
        figures.curves(axis, "step", what)
        axis.set_xlim(0, max(row["step"] for row in rows) * 1.02)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8.5, frameon=False)
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def _evaluated(rows: Rows, metric: str) -> list[tuple[str, int, dict[str, Any]]]:
    """Names such as `v2/ema/top1` of a metric, the number of their set, and how that is drawn."""
    names = [name for name in _names(rows) if name.rsplit("/", 1)[-1] == metric]
    sets = [tuple(part for part in name.split("/")[:-1] if part != "ema") for name in names]
    order = list(dict.fromkeys(sets))
    found = []
    for name, index in zip(names, map(order.index, sets), strict=True):
        dashes = "--" if "ema" in name.split("/") else "-"
        style = {"linestyle": dashes, "marker": MARKERS[index % len(MARKERS)], "markersize": 3.2}
        found.append((name, index, style))
    return found


def _names(rows: Rows) -> list[str]:
    """Every single-valued name, in the order of appearance."""
    return list(dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, (int, float))))


def _points(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]
