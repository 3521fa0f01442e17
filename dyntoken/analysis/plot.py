"""Plots of a model with exits: accuracy against cost, exit shares against budget.

Needs matplotlib (`pip install matplotlib`), imported on first use.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from dyntoken.analysis.figures import INK, matplotlib

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6a3d9a", "#8c510a")
STYLES = {
    "anytime": {"linestyle": "none", "marker": "s", "markersize": 7, "markerfacecolor": "white"},
    "budgeted": {"linestyle": "-", "marker": "o", "markersize": 3.2, "linewidth": 1.5},
    "rule": {"linestyle": "--", "linewidth": 1.1},
    "rival": {"linestyle": "none", "marker": "D", "markersize": 5.5, "markerfacecolor": "white"},
    "other": {"linestyle": "-.", "marker": "^", "markersize": 3.6, "linewidth": 1.3},
    "cited": {"linestyle": ":", "marker": "x", "markersize": 5, "linewidth": 1.0},
}


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
      label: in the legend.
      cost: average cost of an image.
      accuracy: top-1 fractions.
      kind: one of `STYLES`: decides the line.
      band: standard errors of the accuracy, drawn as a band; or None.
    """

    label: str
    cost: Sequence[float]
    accuracy: Sequence[float]
    kind: str = "budgeted"
    band: Sequence[float] | None = None


def curves(series: Sequence[Series], *, xlabel: str, title: str) -> Any:
    """Accuracy in per cent against cost, a matplotlib `Figure`.

    Raises:
      ValueError: nothing to draw.
      ModuleNotFoundError: matplotlib is absent; the message says what to install.
    """
    if not series:
        raise ValueError("no curve to draw")
    figure, axis = _figure(8.2, 5.0)
    colours = iter(COLOURS * 4)
    for one in series:
        order = np.argsort(one.cost, kind="stable")
        cost, accuracy = np.asarray(one.cost)[order], 100 * np.asarray(one.accuracy)[order]
        colour = INK if one.kind == "anytime" else next(colours)
        above = 4 if STYLES[one.kind]["linestyle"] == "none" else 3  # single points lie on top of lines
        axis.plot(cost, accuracy, color=colour, label=one.label, zorder=above, **STYLES[one.kind])
        if one.band is not None:
            half = 100 * np.asarray(one.band)[order]
            axis.fill_between(cost, accuracy - half, accuracy + half, color=colour, alpha=0.13, linewidth=0)
    axis.set_xlabel(xlabel)
    axis.set_ylabel("top-1 accuracy (%)")
    axis.set_title(title, fontsize=11, color=INK)
    axis.grid(color="#e4e4e4", linewidth=0.7)
    axis.set_axisbelow(True)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8.5, frameon=False)
    return figure


def shares(cost: Sequence[float], parts: np.ndarray, *, xlabel: str, title: str) -> Any:
    """Which share of the images leaves at which exit, stacked over the budget.

    Args:
      cost: budgets `[M]`, ascending.
      parts: shares `[M, E]`, each row sums to one.

    Returns:
      A matplotlib `Figure`.

    Raises:
      ValueError: shapes that do not fit.
    """
    cost, parts = np.asarray(cost, float), np.asarray(parts, float)
    if parts.ndim != 2 or cost.shape != parts.shape[:1] or not len(cost):
        raise ValueError(f"shares [budgets, exits] do not fit budgets: {parts.shape} and {cost.shape}")
    figure, axis = _figure(7.4, 4.2)
    exits = parts.shape[1]
    tones = [_tone(index, exits) for index in range(exits)]
    labels = [f"exit {index}" for index in range(exits)]
    if len(cost) == 1:
        bottoms = np.concatenate([[0], np.cumsum(parts[0])[:-1]])
        for index in range(exits):
            axis.bar(
                [0],
                100 * parts[0, index],
                bottom=100 * bottoms[index],
                color=tones[index],
                label=labels[index],
            )
        axis.set_xticks([0], [f"{cost[0]:.4g}"])
    else:
        axis.stackplot(cost, 100 * parts.T, colors=tones, labels=labels, edgecolor="white", linewidth=0.8)
        axis.set_xlim(cost[0], cost[-1])
    axis.set_ylim(0, 100)
    axis.set_xlabel(xlabel)
    axis.set_ylabel("images that leave (%)")
    axis.set_title(title, fontsize=11, color=INK)
    handles, names = axis.get_legend_handles_labels()
    # The legend reads as the stack does, the last exit on top.
    figure.legend(handles[::-1], names[::-1], loc="outside right upper", fontsize=9, frameon=False)
    return figure


def save(figure: Any, path: Any) -> None:
    """Writes a figure as PNG at its own resolution, making the folder.

    Args:
      figure: a matplotlib `Figure`.
      path: an `epath.Path`, also on `gs://`, or any other path object.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def _tone(index: int, exits: int) -> tuple[float, float, float]:
    """Pale for the first exit, dark for the last."""
    share = index / max(exits - 1, 1)
    pale, dark = np.array([0.74, 0.86, 0.93]), np.array([0.05, 0.25, 0.45])
    return tuple((pale + share * (dark - pale)).tolist())


def _figure(width: float, height: float) -> tuple[Any, Any]:
    figure = matplotlib("figure").Figure(
        figsize=(width, height), dpi=120, layout="constrained", facecolor="white"
    )
    axis = figure.subplots()
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return figure, axis
