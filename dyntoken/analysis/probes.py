"""Accuracy of features without a trained head: neighbours in a labelled gallery, or a linear probe."""

from __future__ import annotations

import numpy as np
from scipy import optimize


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


def logistic(
    features: np.ndarray, labels: np.ndarray, classes: int, *, decays: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
) -> tuple[np.ndarray, np.ndarray]:
    """A linear classifier by multinomial logistic regression, to start a network's head from.

    Args:
      features, labels: `[N, C]` and their classes `[N]`.
      decays: weights of half the squared norm beside the mean cross-entropy, of which a fifth of the
        rows, left out at first, chooses one.

    Returns:
      kernel `[C, classes]` and bias `[classes]` on the features as they are, float32.
    """
    mean, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    x, held_out = (features - mean) / spread, np.arange(len(features)) % 5 == 0
    best = decays[0]
    if len(decays) > 1:
        inner, names, outer, truth = x[~held_out], labels[~held_out], x[held_out], labels[held_out]
        losses = []
        for decay in decays:
            kernel, bias = _descend(inner, names, classes, decay)
            losses.append(_cross_entropy(outer @ kernel + bias, truth)[0])
        best = decays[int(np.argmin(losses))]
    kernel, bias = _descend(x, labels, classes, best)
    kernel = kernel / spread[:, None]
    return kernel.astype(np.float32), (bias - mean @ kernel).astype(np.float32)


def _descend(x: np.ndarray, labels: np.ndarray, classes: int, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias at the minimum, found by L-BFGS."""
    width = x.shape[1]

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kernel, bias = flat[:-classes].reshape(width, classes), flat[-classes:]
        loss, slope = _cross_entropy(x @ kernel + bias, labels)
        grads = np.concatenate([(x.T @ slope + decay * kernel).ravel(), slope.sum(axis=0)])
        return loss + 0.5 * decay * float((kernel**2).sum()), grads

    start = np.zeros((width + 1) * classes)
    flat = optimize.minimize(value, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    return flat[:-classes].reshape(width, classes), flat[-classes:]


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over the rows in nats, and its gradient."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    probs = np.exp(shifted)
    total = probs.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = float(np.mean(np.log(total[:, 0]) - shifted[rows, labels]))
    slope = probs / total
    slope[rows, labels] -= 1
    return loss, slope / len(labels)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


PROBES = {"neighbours": neighbours, "linear": linear}
