"""Random draws that do not depend on the topology, and Gumbel-softmax.

Every draw is keyed by stream, stage or layer, and global example index, so one
device, four devices and two hosts draw the same numbers for the same example.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array


@flax.struct.dataclass
class Draws:
    """A source of per-example randomness.

    Attributes:
      key: the step's key of one stream ("policy", "dropout").
      ids: `[B]` int32, global index of each example in the global batch.
    """

    key: Array
    ids: Array

    def keys(self, *path: int | Array) -> Array:
        """One key per example, `[B]`, for a stage or layer."""
        key = self.key
        for number in path:
            key = jax.random.fold_in(key, number)
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, self.ids)

    def gumbel(self, shape: tuple[int, ...], *path: int) -> Array:
        """Gumbel(0, 1) noise `[B, *shape]` float32."""
        return jax.vmap(lambda k: jax.random.gumbel(k, shape))(self.keys(*path))

    def uniform(self, shape: tuple[int, ...], *path: int) -> Array:
        """Uniform(0, 1) `[B, *shape]` float32."""
        return jax.vmap(lambda k: jax.random.uniform(k, shape))(self.keys(*path))

    def bernoulli(self, p: float | Array, shape: tuple[int, ...], *path: int | Array) -> Array:
        """Booleans `[B, *shape]`, True with probability p."""
        return jax.vmap(lambda k: jax.random.bernoulli(k, p, shape))(self.keys(*path))


def gumbel_softmax(logits: Array, noise: Array, *, temperature: float = 1.0, hard: bool = True) -> Array:
    """A sample of a categorical variable, differentiable in `logits`.

    Jang et al. 2017; torch's `gumbel_softmax`. With `hard` the forward value is
    exactly one-hot and the gradient is that of the soft sample
    (straight-through).

    Args:
      logits: `[..., classes]` (log-probabilities serve as well).
      noise: Gumbel(0, 1) draws of the same shape.
      temperature: > 0.
    """
    soft = jax.nn.softmax((logits + noise) / temperature, axis=-1)
    if not hard:
        return soft
    one_hot = jax.nn.one_hot(soft.argmax(axis=-1), logits.shape[-1], dtype=soft.dtype)
    # Written as a sum of exact zeros, so that the forward value stays exactly 0 or 1.
    return one_hot + (soft - jax.lax.stop_gradient(soft))


def top_k_mask(logits: Array, kept: Array, dropped: Array, *, temperature: float = 1.0) -> Array:
    """1.0 for the rows that top-k keeps and 0.0 for the others, with the gradient of a soft choice.

    The soft choice is `sigmoid((logits - t) / temperature)`, t halfway between the
    worst row kept and the best one dropped and without gradient (straight-through).
    Its slope is largest at the cut, wherever that lies: a number added to all
    logits changes nothing, so no loss has to hold their level.

    Args:
      logits: `[B, n]`.
      kept, dropped: `[B, k]` and `[B, n - k]` rows, best first, see `ops.select.split`.
      temperature: > 0.

    Returns:
      `[B, n]` float32; constant ones where nothing is dropped.
    """
    if not dropped.shape[1]:
        return jnp.ones(logits.shape, jnp.float32)
    worst, best = (jnp.take_along_axis(logits, rows, axis=1) for rows in (kept[:, -1:], dropped[:, :1]))
    cut = jax.lax.stop_gradient((worst + best) / 2)
    soft = jax.nn.sigmoid((logits - cut) / temperature)
    hard = (kept[:, :, None] == jnp.arange(logits.shape[1])[None, None, :]).any(axis=1)
    return hard.astype(jnp.float32) + (soft - jax.lax.stop_gradient(soft))


def permutation(alive: Array, draws: Draws, *path: int) -> Array:
    """A random order of the rows alive in each example; dead rows stay in place.

    Args:
      alive: `[B, n]`.

    Returns:
      `[B, n]` int32: row i takes the value of row `result[:, i]`.
    """
    n = alive.shape[1]
    live = alive > 0.5
    shuffled = jnp.argsort(jnp.where(live, draws.uniform((n,), *path), 2.0), axis=1)
    rank = jnp.maximum(jnp.cumsum(live, axis=1) - 1, 0)
    rows = jnp.arange(n)[None, :]
    return jnp.where(live, jnp.take_along_axis(shuffled, rank, axis=1), rows).astype(jnp.int32)


def dropout(x: Array, rate: float, draws: Draws, *path: int | Array) -> Array:
    """Zeroes elements of `x [B, ...]` with probability `rate`, rescaling the rest."""
    keep = draws.bernoulli(1.0 - rate, x.shape[1:], *path)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def drop_path(x: Array, rate: float | Array, draws: Draws, *path: int | Array) -> Array:
    """Zeroes a whole residual branch per example (stochastic depth), rescaling the rest.

    Args:
      rate, path: Python numbers, or traced scalars where a loop runs the layers.
    """
    stays = 1.0 - rate
    keep = draws.bernoulli(stays, (1,) * (x.ndim - 1), *path)
    return jnp.where(keep, x / jnp.asarray(stays, x.dtype), jnp.zeros_like(x))
