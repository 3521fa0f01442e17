"""Accuracy of features without a trained head: neighbours in a labelled gallery, or a linear probe."""

from __future__ import annotations

import numpy as np


def neighbours(
    gallery: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Classes by a weighted vote of the k nearest neighbours (Wu et al. 2018; DINO's and DINOv2's k-NN).

    Args:
      gallery, labels: features `[G, C]` and their classes `[G]`.
      queries: `[Q, C]`.
      k: neighbours, by cosine similarity s; each votes with exp(s / temperature).

    Returns:
      `[Q]` classes.
    """
    k = min(k, len(gallery))
    similarity = _unit(queries) @ _unit(gallery).T
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    best = np.take_along_axis(similarity, nearest, axis=1)
    weights = np.exp((best - best.max(axis=1, keepdims=True)) / temperature)
    votes = np.zeros((len(queries), classes))
    np.add.at(votes, (np.arange(len(queries))[:, None], labels[nearest]), weights)
    return votes.argmax(axis=1)


def linear(
    gallery: np.ndarray, labels: np.ndarray, queries: np.ndarray, classes: int, *, ridge: float = 1e-2
) -> np.ndarray:
    """Classes by ridge regression onto one-hot targets, solved in closed form.

    Args:
      gallery, labels, queries: see `neighbours`.
      ridge: penalty, relative to the mean squared length of a standardised feature.

    Returns:
      `[Q]` classes.
    """
    mean, spread = gallery.mean(axis=0), gallery.std(axis=0) + 1e-6
    x = np.concatenate([(gallery - mean) / spread, np.ones((len(gallery), 1))], axis=1).astype(np.float64)
    y = np.eye(classes)[labels]
    weights = np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ y)
    q = np.concatenate([(queries - mean) / spread, np.ones((len(queries), 1))], axis=1)
    return (q @ weights).argmax(axis=1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


PROBES = {"neighbours": neighbours, "linear": linear}
