"""Pictures of an evaluation: the confusion matrix, and how far confidence is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dyntoken.analysis import figures

NAMED, COUNTED = 40, 16  # classes: with more there is no room for their names, or for numbers


def picture(
    counts: np.ndarray, names: Sequence[str], confidence: np.ndarray, right: np.ndarray, *, title: str
) -> Any:
    """A matplotlib `Figure`: left the confusion matrix by rows, right accuracy against confidence.

    Args:
      counts: `[K, K]`, labels x answers.
      names: of the classes; numbers without any.
      confidence: `[N]` of the answers; right: bool `[N]`.
      title: above both.

    Raises:
      ModuleNotFoundError: matplotlib is absent; the message says what to install.
    """
    classes = len(counts)
    side = 4.6 if classes <= COUNTED else 6.2
    figure = figures.figure(side + 4.6, side)
    left, side_axis = figure.subplots(1, 2, width_ratios=(side, 3.6))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown = left.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(shown, ax=left, fraction=0.045, pad=0.02, label="share of the images of a class")
    if classes <= NAMED:
        ticks = range(classes)
        words = [names[n] if n < len(names) else str(n) for n in ticks]
        small = {"fontsize": 8 if classes <= COUNTED else 6}
        left.set_xticks(ticks, words, rotation=60, ha="right", rotation_mode="anchor", **small)
        left.set_yticks(ticks, words, **small)
    if classes <= COUNTED:
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                colour = "white" if share > 0.5 else figures.INK
                left.text(
                    column, row, int(counts[row, column]), ha="center", va="center", color=colour, fontsize=7
                )
    left.set(xlabel="answer", ylabel="label")
    reliability(side_axis, confidence, right)
    figure.suptitle(title, fontsize=11, color=figures.INK)
    return figure


def reliability(axis: Any, confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> None:
    """Accuracy of the answers of each bin of confidence, and how many there are."""
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    some = count > 0
    accuracy = np.bincount(which, right, minlength=bins)[some] / count[some]
    centre = (np.arange(bins)[some] + 0.5) / bins
    axis.bar(
        centre, count[some] / count.sum(), width=0.9 / bins, color="#c9d4e3", label="share of the images"
    )
    axis.plot([0, 1], [0, 1], color=figures.FRAME, linewidth=0.9, linestyle="--", label="as sure as right")
    axis.plot(centre, accuracy, "o-", color=figures.COLOURS[0], markersize=4, linewidth=1.3, label="accuracy")
    figures.curves(axis, "confidence", "accuracy")
    axis.set(xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(fontsize=8, frameon=False, loc="upper left")
