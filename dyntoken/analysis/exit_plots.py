"""Plots of a model with exits: accuracy against cost, exit shares against budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dyntoken.analysis import figures

STYLES = {
    "anytime": {"linestyle": "none", "marker": "s", "markersize": 7, "markerfacecolor": "white"},
    "budgeted": {"linestyle": "-", "marker": "o", "markersize": 3.2, "linewidth": 1.5},
    "rule": {"linestyle": "--", "linewidth": 1.1},
    "rival": {"linestyle": "none", "marker": "D", "markersize": 5.5, "markerfacecolor": "white"},
    "other": {"linestyle": "-.", "marker": "^", "markersize": 3.6, "linewidth": 1.3},
    "cited": {"linestyle": ":", "marker": "x", "markersize": 5, "linewidth": 1.0},
}
PALE, DARK = np.array([0.74, 0.86, 0.93]), np.array([0.05, 0.25, 0.45])  # the first exit and the last


class Series(NamedTuple):
    """One curve: top-1 fractions against the average cost of an image."""

    label: str
    cost: Sequence[float]
    accuracy: Sequence[float]
    kind: str = "budgeted"  # one of `STYLES`
    band: Sequence[float] | None = None  # standard errors of the accuracy


def curves(series: Sequence[Series], *, xlabel: str, title: str) -> Any:
    """Accuracy in per cent against cost, a matplotlib `Figure`.

    Raises:
      ValueError: nothing to draw.
      ModuleNotFoundError: matplotlib is absent; the message says what to install.
    """
    if not series:
        raise ValueError("no curve to draw")
    figure = figures.figure(8.2, 5.0)
    axis = figure.subplots()
    figures.curves(axis, xlabel, "top-1 accuracy (%)")
    axis.set_title(title, fontsize=11, color=figures.INK)
    colours = itertools.cycle(figures.COLOURS)
    for label, cost, accuracy, kind, band in series:
        order = np.argsort(cost, kind="stable")
        cost, accuracy = np.asarray(cost)[order], 100 * np.asarray(accuracy)[order]
        colour = figures.INK if kind == "anytime" else next(colours)
        above = 4 if STYLES[kind]["linestyle"] == "none" else 3  # single points lie on top of lines
        axis.plot(cost, accuracy, color=colour, label=label, zorder=above, **STYLES[kind])
        if band is not None:
            half = 100 * np.asarray(band)[order]
            axis.fill_between(cost, accuracy - half, accuracy + half, color=colour, alpha=0.13, linewidth=0)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8.5, frameon=False)
    return figure


def shares(cost: Sequence[float], parts: np.ndarray, *, xlabel: str, title: str) -> Any:
    """Which share of the images leaves at which exit, stacked over the budget, a matplotlib `Figure`.

    Args:
      cost: budgets `[M]`, ascending.
      parts: shares `[M, E]`, each row sums to one.

    Raises:
      ValueError: shapes that do not fit.
    """
    cost, parts = np.asarray(cost, float), 100 * np.asarray(parts, float)
    if parts.ndim != 2 or cost.shape != parts.shape[:1] or not len(cost):
        raise ValueError(f"shares [budgets, exits] do not fit budgets: {parts.shape} and {cost.shape}")
    figure = figures.figure(7.4, 4.2)
    axis = figure.subplots()
    figures.curves(axis, xlabel, "images that leave (%)")
    axis.grid(visible=False)
    axis.set_title(title, fontsize=11, color=figures.INK)
    tones = [tuple(PALE + part * (DARK - PALE)) for part in np.linspace(0, 1, parts.shape[1])]
    labels = [f"exit {index}" for index in range(parts.shape[1])]
    if len(cost) == 1:
        bottoms = np.cumsum(parts[0]) - parts[0]
        for part, bottom, tone, label in zip(parts[0], bottoms, tones, labels, strict=True):
            axis.bar([0], part, bottom=bottom, color=tone, label=label)
        axis.set_xticks([0], [f"{cost[0]:.4g}"])
    else:
        axis.stackplot(cost, parts.T, colors=tones, labels=labels, edgecolor="white", linewidth=0.8)
        axis.set_xlim(cost[0], cost[-1])
    axis.set_ylim(0, 100)
    handles, names = axis.get_legend_handles_labels()
    # The legend reads as the stack does, the last exit on top.
    figure.legend(handles[::-1], names[::-1], loc="outside right upper", fontsize=9, frameon=False)
    return figure
