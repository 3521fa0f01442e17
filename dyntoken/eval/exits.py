"""Exit rules, which image leaves where, and what that costs.

Follows DVT (arXiv 2105.15075; `inference.py` of
blackfeather-wang/Dynamic-Vision-Transformer) and MSDNet (arXiv 1703.09844:
anytime and budgeted-batch classification).

Everywhere `E` is the number of exits, `N` of images, `K` of classes. Scores are
higher where an exit is surer. Costs are *cumulative*: what an image costs in
total if it leaves at that exit (MACs, or a measured time), in any one unit.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.registry import Table

Array = np.ndarray

# The released code's values; finite, so that they survive JSON.
NEVER = 1e8  # no image leaves at this exit
ALWAYS = -1e8  # every image does
SLACK = 1e-9  # relative: a budget that is an average cost, recomputed, must admit that cost


# Rules: softmax probabilities [..., K] to scores [...], by NumPy or by jax.numpy (`xp`), so that host and
# device cannot drift.


def confidence(probs: Any, xp: Any) -> Any:
    """Largest probability, in (0, 1]: the rule of the paper and of the released code."""
    return xp.max(probs, axis=-1)


def entropy(probs: Any, xp: Any) -> Any:
    """Negative entropy in nats, in [-log K, 0] (DVT's ablation of the rule)."""
    # 0 log 0 = 0: an underflowed class adds nothing.
    return xp.sum(probs * xp.log(xp.where(probs > 0, probs, 1)), axis=-1)


def margin(probs: Any, xp: Any) -> Any:
    """Largest minus second largest probability, in [0, 1]."""
    if probs.shape[-1] < 2:
        raise ValueError("the margin rule needs at least two classes, the logits have one")
    first = xp.argmax(probs, axis=-1, keepdims=True)
    others = xp.where(xp.arange(probs.shape[-1]).reshape((1,) * (probs.ndim - 1) + (-1,)) == first, 0, probs)
    return xp.max(probs, axis=-1) - xp.max(others, axis=-1)


# None ignores the logits (DVT's ablation): uniform draws in [0, 1) of the seed, the exit and the number of
# the image, so that a set scored in parts, or by the runner, gets the same ones.
RULES = Table("exit rule", {"confidence": confidence, "entropy": entropy, "margin": margin, "random": None})


def score(rule: str, logits: Any, *, seed: int = 0, start: int = 0) -> Array:
    """Scores `[E, N]` of logits `[E, N, K]` under a rule of `RULES`.

    `seed` and `start`, the number of the first image, are for the random rule.

    Raises:
      UnknownNameError: no such rule (a ValueError).
      ValueError: not `[E, N, K]`, or NaN.
    """
    of_probabilities, logits = RULES[rule], _logits(logits)
    if of_probabilities is not None:
        return of_probabilities(_softmax(logits, np), np)
    numbers = np.arange(start, start + logits.shape[1], dtype=np.int32)
    return np.stack([np.asarray(_host_draws(seed, exit_, numbers)) for exit_ in range(len(logits))])


def step_score(rule: str, logits: jax.Array, *, exit_: int, numbers: jax.Array, seed: int = 0) -> jax.Array:
    """`score` of one exit inside a compiled program: logits `[B, K]` to float32 `[B]`.

    Up to the rounding of exponentials and sums it is that of the host. NaN logits
    make a NaN score, which is below every threshold. `numbers` int32 `[B]` are
    those of the images in their set, for the random rule.
    """
    of_probabilities = RULES[rule]
    if of_probabilities is None:
        return _draws(seed, exit_, numbers)
    return of_probabilities(_softmax(logits.astype(jnp.float32), jnp), jnp)


def _softmax(logits: Any, xp: Any) -> Any:
    raised = xp.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def _draws(seed: int, exit_: Any, numbers: Any) -> jax.Array:
    """Uniform float32 `[B]`, one per image number."""
    key = jax.random.fold_in(jax.random.key(seed), exit_)
    return jax.vmap(lambda number: jax.random.uniform(jax.random.fold_in(key, number)))(numbers)


_host_draws = functools.partial(jax.jit, static_argnums=0)(_draws)


def correct_of(logits: Any, labels: Any) -> Array:
    """Whether each exit's largest logit (of `[E, N, K]`; the first of equals) is the label `[N]`, bool `[E, N]`.

    Raises:
      ValueError: shapes that do not fit, or NaN.
    """
    logits, labels = _logits(logits), np.asarray(labels)
    if labels.shape != logits.shape[1:2]:
        raise ValueError(f"labels {labels.shape} do not fit logits {logits.shape}: give one per image")
    return logits.argmax(axis=-1) == labels[None, :]


def exit_of(scores: Any, thresholds: Any) -> Array:
    """The exit each image leaves at, int64 `[N]`.

    As the released `dynamic_evaluate`: the first exit with score `[E, N]` >=
    threshold `[E]`, so an image exactly at the threshold leaves and tied images
    leave together. The last exit takes the rest: its threshold (-1e8 in the
    released checkpoints) decides nothing.

    Raises:
      ValueError: thresholds of another length, or NaN anywhere.
    """
    scores = check_scores(scores)
    leaves = scores >= check_thresholds(thresholds, scores)[:, None]  # [E, N]
    leaves[-1] = True
    return leaves.argmax(axis=0)


@dataclasses.dataclass(frozen=True)
class Operating:
    """An operating point: a set of thresholds and what it does on a set of images.

    Attributes:
      thresholds: `[E]`; those a solver found are in the dtype of the scores.
      accuracy: top-1 fraction in [0, 1].
      cost: average cost of an image, in the unit of the given costs.
      counts: images that leave at each exit, int64 `[E]`.
      correct: how many of those are right, int64 `[E]`.
      budget: the average cost asked for, None if none was.
      solver: row of `solvers.SOLVERS`, None if nothing was searched.
      resolution: largest share of the images between two neighbouring candidates
        of an exit; 0.0: all were tried, it is optimal. None: nothing is promised.
      evaluations: sets of thresholds that the search compared.
      seconds: wall time of the search; where it answers all budgets together,
        these two are those of all.
    """

    thresholds: Array
    accuracy: float
    cost: float
    counts: Array
    correct: Array
    budget: float | None = None
    solver: str | None = None
    resolution: float | None = None
    evaluations: int = 0
    seconds: float = 0.0

    @property
    def shares(self) -> Array:
        """Fractions of the images that leave at each exit, `[E]`."""
        return self.counts / self.counts.sum()

    @property
    def error(self) -> float:
        """Binomial standard error of the accuracy."""
        return float(np.sqrt(self.accuracy * (1 - self.accuracy) / self.counts.sum()))


def evaluate(correct: Any, scores: Any, thresholds: Any, costs: Any) -> Operating:
    """Accuracy, average cost and exit counts (the released `dynamic_evaluate`, sums in float64).

    Args:
      correct: bool `[E, N]`, see `correct_of`.
      scores: `[E, N]`.
      thresholds: `[E]`.
      costs: `[E]` cumulative cost of leaving at each exit, strictly increasing.

    Raises:
      ValueError: shapes that do not fit, NaN, or costs that do not increase.
    """
    correct, scores, costs = check_calibration(correct, scores, costs)
    return measure(correct, scores, check_thresholds(thresholds, scores), costs)


def measure(correct: Array, scores: Array, thresholds: Array, costs: Array) -> Operating:
    """`evaluate` for arguments that are checked already: for the inner loops of the solvers."""
    count, images = scores.shape
    counts, right = np.zeros(count, np.int64), np.zeros(count, np.int64)
    here = np.ones(images, dtype=bool)  # masks: several times as fast as indexing by exit
    for exit_ in range(count):
        leaves = here & (scores[exit_] >= thresholds[exit_]) if exit_ < count - 1 else here
        counts[exit_] = np.count_nonzero(leaves)
        right[exit_] = np.count_nonzero(leaves & correct[exit_])
        here = here & ~leaves
    return Operating(thresholds, float(right.sum()) / images, float(counts @ costs) / images, counts, right)


def anytime(correct: Any, costs: Any) -> list[Operating]:
    """Anytime classification (MSDNet, section 3): every image leaves at exit i, one point per exit.

    Arguments and errors as `evaluate`.
    """
    correct = _correct(correct)
    count, unsure = len(correct), np.zeros(correct.shape)
    costs = check_costs(costs, count)
    limits = np.where(np.arange(count)[None, :] < np.arange(count)[:, None], NEVER, ALWAYS)
    return [measure(correct, unsure, row, costs) for row in limits]


# Checks: one clear line each.


def check_scores(scores: Any) -> Array:
    """Scores as an array `[E, N]` of floats within ±1e8, E, N >= 1, without NaN; ValueError otherwise."""
    scores = np.asarray(scores)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores must be [exits, images], got shape {scores.shape}")
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float64)
    if np.isnan(scores).any():
        exit_, image = np.argwhere(np.isnan(scores))[0]
        raise ValueError(f"scores are NaN (first at exit {exit_}, image {image}): no threshold can decide")
    if not (np.abs(scores) < NEVER).all():
        raise ValueError(f"scores must lie within ±{NEVER:g}, which stand for never and always leaving")
    return scores


def check_thresholds(thresholds: Any, scores: Array) -> Array:
    """Thresholds as an array `[E]` without NaN, in the dtype of `scores [E, N]`; ValueError otherwise.

    A threshold of 0.9 lets a float32 score of 0.9 leave, on the host as on a device.
    """
    exits = len(scores)
    with np.errstate(over="ignore"):  # 1e300 is infinite in float32: no image leaves, as asked
        limits = np.asarray(thresholds).astype(scores.dtype)
    if limits.shape != (exits,):
        raise ValueError(f"{exits} exits need {exits} thresholds, got shape {limits.shape}")
    if np.isnan(limits).any():
        raise ValueError(f"threshold {int(np.argmax(np.isnan(limits)))} is NaN: no image would leave there")
    return limits


def check_costs(costs: Any, exits: int) -> Array:
    """Cumulative costs as float64 `[exits]`, positive and strictly increasing; ValueError otherwise."""
    costs = np.asarray(costs, dtype=np.float64)
    if costs.shape != (exits,):
        raise ValueError(f"{exits} exits need {exits} costs, got shape {costs.shape}")
    if not np.isfinite(costs).all() or costs[0] <= 0 or (np.diff(costs) <= 0).any():
        text = ", ".join(f"{cost:g}" for cost in costs)
        raise ValueError(f"costs must be cumulative, positive and strictly increasing, got {text}")
    return costs


def check_calibration(correct: Any, scores: Any, costs: Any) -> tuple[Array, Array, Array]:
    """`(correct, scores, costs)` that fit one another; ValueError otherwise."""
    correct, scores = _correct(correct), check_scores(scores)
    if correct.shape != scores.shape:
        raise ValueError(
            f"correct {correct.shape} and scores {scores.shape} differ: both are [exits, images]"
        )
    return correct, scores, check_costs(costs, len(scores))


def check_budgets(budgets: Any, costs: Array) -> Array:
    """Average-cost budgets as float64 `[M]`, none below the first exit's cost; ValueError otherwise."""
    budgets = np.atleast_1d(np.asarray(budgets, dtype=np.float64))
    if budgets.ndim != 1 or not len(budgets) or np.isnan(budgets).any():
        raise ValueError("budgets must be one number or a list of numbers, none of them NaN")
    if costs[0] > budgets.min() * (1 + SLACK):
        raise ValueError(
            f"budget {budgets.min():g} is below the first exit, which every image pays: {costs[0]:g}"
        )
    return budgets


def _logits(logits: Any) -> Array:
    logits = np.asarray(logits)
    if logits.ndim != 3 or 0 in logits.shape:
        raise ValueError(f"logits must be [exits, images, classes], got shape {logits.shape}")
    if logits.dtype not in (np.float32, np.float64):
        logits = logits.astype(np.float32)  # bfloat16 and float16 tie far too often
    if np.isnan(logits).any() or (logits == np.inf).any():
        raise ValueError("logits are NaN or infinite: no exit rule can score them")
    return logits


def _correct(correct: Any) -> Array:
    correct = np.asarray(correct)
    if correct.ndim != 2 or 0 in correct.shape:
        raise ValueError(f"correct must be [exits, images], got shape {correct.shape}")
    if correct.dtype != bool and not np.isin(correct, (0, 1)).all():
        raise ValueError("correct must hold True or False (logits go through correct_of first)")
    return correct.astype(bool)
