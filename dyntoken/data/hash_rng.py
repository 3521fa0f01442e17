"""Stateless draws: every number is a hash of (seed, epoch, example, ...).

Nothing is carried from batch to batch, so a batch can be made again from its
step alone, by any process. The hash is the finaliser of SplitMix64 (Steele,
Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) and
not `numpy.random`, whose streams may change between releases.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MUL_1 = np.uint64(0xBF58476D1CE4E5B9)
_MUL_2 = np.uint64(0x94D049BB133111EB)


def _finalise(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MUL_1
    x = (x ^ (x >> np.uint64(27))) * _MUL_2
    return x ^ (x >> np.uint64(31))


def _words(part: int | np.ndarray) -> np.ndarray:
    if isinstance(part, int):
        part = np.uint64(part % (1 << 64))
    return np.atleast_1d(np.asarray(part)).astype(np.uint64)


def bits(*parts: int | np.ndarray) -> np.ndarray:
    """64 random bits per entry of the integers or integer arrays, broadcast to at least one axis, uint64."""
    state = np.array([0x243F6A8885A308D3], np.uint64)
    for part in parts:
        state = _finalise(state + _GOLDEN ^ _finalise(_words(part) + _GOLDEN))
    return state


def int63(*parts: int) -> int:
    """A seed for TensorFlow's draws."""
    return int(bits(*parts)[0] >> np.uint64(1))


def uniform(*parts: int | np.ndarray) -> np.ndarray:
    """Float64 in [0, 1), shaped as `bits` of the same parts."""
    return (bits(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *parts: int) -> np.ndarray:
    """A random order of `range(count)`, int64 `[count]`."""
    return np.argsort(bits(*parts, np.arange(count)), kind="stable")


def balanced(labels: np.ndarray, *parts: int) -> np.ndarray:
    """A random order of labels `[N]` in which all classes that occur come equally often, int64 `[N]`.

    Of a class with too many examples a random choice is in it, those of a class
    with too few come several times, each as often as the others to within one.
    """
    count = len(labels)
    order = permutation(count, *parts, 0)
    order = order[np.argsort(labels[order], kind="stable")]  # class after class, each at random
    _, sizes = np.unique(labels, return_counts=True)
    turn, which = np.divmod(permutation(count, *parts, 1), len(sizes))
    return order[(np.cumsum(sizes) - sizes)[which] + turn % sizes[which]]


def stratified(labels: np.ndarray, *keys: int | np.ndarray) -> np.ndarray:
    """A fixed random order any range of which holds its share of every class, int64 `[N]`.

    Keyed by integers, and by integer arrays `[N]` that tell examples apart: an example
    keeps its rank within its class when others are added.
    """
    count = len(labels)
    tie = bits(*keys, labels) + np.zeros(count, np.uint64)
    order = np.lexsort((tie, labels))  # class after class, each at random
    _, start, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    size = np.repeat(sizes, sizes)
    share = (np.arange(count) - np.repeat(start, sizes) + 0.5) / size  # of its class that an example ends
    return order[np.lexsort((tie[order], share))]
