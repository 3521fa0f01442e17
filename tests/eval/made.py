"""Made cascades for the threshold solvers."""

from __future__ import annotations

import numpy as np

from dyntoken.eval import exits


def cascade(count, images, seed=0, classes=5):
    """`(correct, scores, costs)` of a made-up cascade whose later exits see more."""
    draw = np.random.default_rng(seed)
    labels, ease = draw.integers(classes, size=images), draw.normal(size=images)
    logits = draw.normal(size=(count, images, classes)) + draw.normal(size=(1, images, classes))
    signal = 0.5 + 2.5 * np.arange(count)[:, None] / count + ease[None, :]
    np.put_along_axis(logits, np.broadcast_to(labels, (count, images))[..., None], signal[..., None], -1)
    logits = logits.astype(np.float32)
    return (
        exits.correct_of(logits, labels),
        exits.score("confidence", logits),
        np.cumsum(np.arange(1.0, count + 1)),
    )


def budgets_of(costs, count=8):
    return np.linspace(costs[0], costs[-1], count)
