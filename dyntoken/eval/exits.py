"""Exit rules, who leaves where, and what that costs.

Follows DVT (arXiv 2105.15075; `inference.py` of
blackfeather-wang/Dynamic-Vision-Transformer) and MSDNet (arXiv 1703.09844:
anytime and budgeted-batch classification). Logits of a whole calibration set are
searched on the host, in NumPy; `step_score` is the same rules inside a compiled
program, for the runner of `eval.runner`.

Everywhere `E` is the number of exits, `N` of images, `K` of classes. Scores are
higher where an exit is surer. Costs are *cumulative*: what an image costs in
total if it leaves at that exit (MACs, or a measured time), in any one unit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.registry import Table

Array = np.ndarray

# The released code's values; finite, so that they survive JSON.
NEVER = 1e8  # nobody leaves at this exit
ALWAYS = -1e8  # everybody does


def confidence(logits: Any, *, seed: int = 0, start: int = 0) -> Array:
    """Largest softmax probability: the rule of the paper and of the released code.

    Args:
      logits: `[E, N, K]`.
      seed, start: not used by a deterministic rule; every rule takes them.

    Returns:
      `[E, N]` in (0, 1].

    Raises:
      ValueError: not `[E, N, K]`, or NaN.
    """
    del seed, start
    return _largest(_softmax(_logits(logits), np), np)


def entropy(logits: Any, *, seed: int = 0, start: int = 0) -> Array:
    """Negative entropy of the softmax in nats, `[E, N]` in [-log K, 0] (DVT's ablation of the rule).

    Arguments and errors as `confidence`.
    """
    del seed, start
    return _negative_entropy(_softmax(_logits(logits), np), np)


def margin(logits: Any, *, seed: int = 0, start: int = 0) -> Array:
    """Largest minus second largest softmax probability, `[E, N]` in [0, 1].

    Arguments and errors as `confidence`; at least two classes.
    """
    del seed, start
    return _lead(_softmax(_logits(logits), np), np)


def random(logits: Any, *, seed: int = 0, start: int = 0) -> Array:
    """Uniform draws `[E, N]` in [0, 1) that ignore the logits (DVT's ablation of the rule).

    A draw is a function of the seed, the exit and the number of the image, so
    that a set may be scored in parts, or by the runner, with the same result.

    Args:
      logits: `[E, N, K]`.
      seed: another seed, other draws.
      start: number of the first image.

    Raises:
      ValueError: as `confidence`.
    """
    count, images = _logits(logits).shape[:2]
    numbers = np.arange(start, start + images, dtype=np.int32)
    return np.stack([np.asarray(_host_draws(seed, exit_, numbers)) for exit_ in range(count)])


RULES = Table("exit rule", {"confidence": confidence, "entropy": entropy, "margin": margin, "random": random})


def score(rule: str, logits: Any, *, seed: int = 0, start: int = 0) -> Array:
    """Scores `[E, N]` of logits `[E, N, K]` under a rule of `RULES`.

    Args:
      seed, start: see `random`.

    Raises:
      UnknownNameError: no such rule (a ValueError).
      ValueError: not `[E, N, K]`, or NaN.
    """
    return RULES[rule](logits, seed=seed, start=start)


def step_score(rule: str, logits: jax.Array, *, exit_: int, numbers: jax.Array, seed: int = 0) -> jax.Array:
    """`score` of one exit inside a compiled program: logits `[B, K]` to float32 `[B]`.

    The arithmetic is that of the host, up to the rounding of exponentials and
    sums. NaN logits make a NaN score, which is below every threshold.

    Args:
      rule: row of `RULES`.
      exit_: number of the exit.
      numbers: int32 `[B]`, number of each image in its set (for `random`).
      seed: see `random`.
    """
    if RULES[rule] is random:
        return _draws(seed, exit_, numbers)
    return _OF_PROBABILITIES[rule](_softmax(logits.astype(jnp.float32), jnp), jnp)


# The rules on probabilities [..., K], by NumPy or by jax.numpy (`xp`): host and device cannot drift.


def _softmax(logits: Any, xp: Any) -> Any:
    raised = xp.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def _largest(probs: Any, xp: Any) -> Any:
    return xp.max(probs, axis=-1)


def _negative_entropy(probs: Any, xp: Any) -> Any:
    # 0 log 0 = 0: an underflowed class adds nothing.
    return xp.sum(probs * xp.log(xp.where(probs > 0, probs, 1)), axis=-1)


def _lead(probs: Any, xp: Any) -> Any:
    if probs.shape[-1] < 2:
        raise ValueError("the margin rule needs at least two classes, the logits have one")
    first = xp.argmax(probs, axis=-1, keepdims=True)
    others = xp.where(xp.arange(probs.shape[-1]).reshape((1,) * (probs.ndim - 1) + (-1,)) == first, 0, probs)
    return xp.max(probs, axis=-1) - xp.max(others, axis=-1)


_OF_PROBABILITIES = {"confidence": _largest, "entropy": _negative_entropy, "margin": _lead}


def _draws(seed: int, exit_: Any, numbers: Any) -> jax.Array:
    """Uniform float32 `[B]`, one per image number."""
    key = jax.random.fold_in(jax.random.key(seed), exit_)
    return jax.vmap(lambda number: jax.random.uniform(jax.random.fold_in(key, number)))(numbers)


_host_draws = functools.partial(jax.jit, static_argnums=0)(_draws)


def correct_of(logits: Any, labels: Any) -> Array:
    """Whether each exit's largest logit is the label, bool `[E, N]`.

    Args:
      logits: `[E, N, K]`; probabilities do as well. The first of equal classes counts.
      labels: `[N]` integers.

    Raises:
      ValueError: shapes that do not fit, or NaN.
    """
    logits, labels = _logits(logits), np.asarray(labels)
    if labels.shape != logits.shape[1:2]:
        raise ValueError(f"labels {labels.shape} do not fit logits {logits.shape}: give one per image")
    return logits.argmax(axis=-1) == labels[None, :]


def exit_of(scores: Any, thresholds: Any) -> Array:
    """The exit each image leaves at, int64 `[N]`.

    As the released `dynamic_evaluate`: the first exit with score >= threshold,
    so an image exactly at the threshold leaves and tied images leave together.
    Whoever reaches the last exit leaves there: its threshold (-1e8 in the
    released checkpoints) is there for the format and decides nothing.

    Args:
      scores: `[E, N]`, higher is surer.
      thresholds: `[E]`.

    Raises:
      ValueError: thresholds of another length, or NaN anywhere.
    """
    scores = check_scores(scores)
    leaves = scores >= check_thresholds(thresholds, scores)[:, None]  # [E, N]
    leaves[-1] = True
    return leaves.argmax(axis=0)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one set of thresholds does on one set of images.

    Attributes:
      accuracy: top-1 fraction in [0, 1].
      cost: average cost of an image, in the unit of the given costs.
      counts: images that leave at each exit, int64 `[E]`.
      correct: how many of those are right, int64 `[E]`.
    """

    accuracy: float
    cost: float
    counts: Array
    correct: Array


def evaluate(correct: Any, scores: Any, thresholds: Any, macs: Any) -> Evaluation:
    """Accuracy, average cost and exit counts (the released `dynamic_evaluate`, sums in float64).

    Args:
      correct: bool `[E, N]`, see `correct_of`.
      scores: `[E, N]`.
      thresholds: `[E]`.
      macs: `[E]` cumulative cost of leaving at each exit, strictly increasing; times do as well.

    Raises:
      ValueError: shapes that do not fit, NaN, or costs that do not increase.
    """
    correct, scores, costs = check_calibration(correct, scores, macs)
    return measure(correct, scores, check_thresholds(thresholds, scores), costs)


def measure(correct: Array, scores: Array, thresholds: Array, costs: Array) -> Evaluation:
    """`evaluate` for arguments that are checked already: for the inner loops of the solvers."""
    count, images = scores.shape
    counts, right = np.zeros(count, np.int64), np.zeros(count, np.int64)
    here = np.ones(images, dtype=bool)  # masks: several times as fast as indexing by exit
    for exit_ in range(count):
        leaves = here & (scores[exit_] >= thresholds[exit_]) if exit_ < count - 1 else here
        counts[exit_] = np.count_nonzero(leaves)
        right[exit_] = np.count_nonzero(leaves & correct[exit_])
        here = here & ~leaves
    return Evaluation(float(right.sum()) / images, float(counts @ costs) / images, counts, right)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points of a cost-accuracy plot.

    Attributes:
      cost: average cost of an image, float64 `[M]`.
      accuracy: top-1 fractions, float64 `[M]`.
      counts: images that leave at each exit, int64 `[M, E]`.
    """

    cost: Array
    accuracy: Array
    counts: Array


def anytime(correct: Any, costs: Any) -> Curve:
    """Anytime classification (MSDNet, section 3): every image leaves at exit i, one point per exit.

    Args:
      correct: bool `[E, N]`.
      costs: `[E]` cumulative, strictly increasing.

    Raises:
      ValueError: as `evaluate`.
    """
    correct = _correct(correct)
    costs = check_costs(costs, len(correct))
    count, images = correct.shape
    return Curve(costs, correct.mean(axis=1), images * np.eye(count, dtype=np.int64))


def budgeted(correct: Any, scores: Any, thresholds: Any, costs: Any) -> Curve:
    """Budgeted-batch classification (MSDNet, section 3): one point per set of thresholds `[M, E]`.

    The other arguments and the errors are those of `evaluate`; the points keep the order of the thresholds.
    """
    correct, scores, costs = check_calibration(correct, scores, costs)
    rows = np.asarray(thresholds)
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"a curve needs thresholds [points, exits], got shape {rows.shape}")
    points = [measure(correct, scores, check_thresholds(row, scores), costs) for row in rows]
    return Curve(
        cost=np.array([point.cost for point in points]),
        accuracy=np.array([point.accuracy for point in points]),
        counts=np.stack([point.counts for point in points]),
    )


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
    with np.errstate(over="ignore"):  # 1e300 is infinite in float32: nobody leaves, as asked
        limits = np.asarray(thresholds).astype(scores.dtype)
    if limits.shape != (exits,):
        raise ValueError(f"{exits} exits need {exits} thresholds, got shape {limits.shape}")
    if np.isnan(limits).any():
        raise ValueError(
            f"threshold {int(np.argmax(np.isnan(limits)))} is NaN: nobody would ever leave there"
        )
    return limits


def check_costs(costs: Any, exits: int) -> Array:
    """Cumulative costs as float64 `[exits]`, positive and strictly increasing; ValueError otherwise."""
    costs = np.asarray(costs, dtype=np.float64)
    if costs.shape != (exits,):
        raise ValueError(f"{exits} exits need {exits} costs, got shape {costs.shape}")
    if not np.isfinite(costs).all() or costs[0] <= 0 or (np.diff(costs) <= 0).any():
        raise ValueError(f"costs must be cumulative, positive and strictly increasing, got {_numbers(costs)}")
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
    if not within(costs[0], budgets.min()):
        raise ValueError(
            f"budget {budgets.min():g} is below the first exit, which every image pays: {costs[0]:g}"
        )
    return budgets


SLACK = 1e-9  # relative: a budget that is an average cost, recomputed, must admit that cost


def within(cost: float, budget: float) -> bool:
    """Whether an average cost keeps a budget, up to rounding."""
    return bool(cost <= budget * (1 + SLACK))


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


def _numbers(values: Sequence[float] | Array) -> str:
    return ", ".join(f"{value:g}" for value in values)
