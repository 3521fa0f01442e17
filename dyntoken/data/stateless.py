"""Stateless draws: every number is a hash of (seed, epoch, example, ...).

Nothing is carried from batch to batch, so a batch can be made again from its
step alone, by any process. The hash is the finaliser of SplitMix64 (Steele,
Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) and
not `numpy.random`, whose streams may change between releases.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MUL_1 = np.uint64(0xBF58476D1CE4E5B9)
_MUL_2 = np.uint64(0x94D049BB133111EB)


def _finalise(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MUL_1
    x = (x ^ (x >> np.uint64(27))) * _MUL_2
    return x ^ (x >> np.uint64(31))


def _words(part: int | np.ndarray) -> np.ndarray:
    if isinstance(part, int):
        return np.array([part & _MASK], np.uint64)
    return np.atleast_1d(np.asarray(part)).astype(np.uint64)


def bits(*parts: int | np.ndarray) -> np.ndarray:
    """64 random bits per entry of the broadcast parts, uint64.

    Args:
      parts: integers or integer arrays that broadcast against each other; the
        result has at least one axis.
    """
    state = np.array([0x243F6A8885A308D3], np.uint64)
    for part in parts:
        state = _finalise(state + _GOLDEN ^ _finalise(_words(part) + _GOLDEN))
    return state


def uniform(*parts: int | np.ndarray) -> np.ndarray:
    """Float64 in [0, 1), shaped as `bits` of the same parts."""
    return (bits(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *parts: int) -> np.ndarray:
    """A random order of `range(count)`, int64 `[count]`."""
    return np.argsort(bits(*parts, np.arange(count)), kind="stable")
