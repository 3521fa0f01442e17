"""From final tokens to logits."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.ops import attend
from dyntoken.types import Tokens

Array = jax.Array
Pool = Literal["token", "mean", "all"]


class ClassHead(nn.Module):
    """Pools the tokens and classifies them.

    Attributes:
      classes: 0 returns the pooled features instead of logits.
      pool: "token" (row 0), "mean" (over the patch rows alive), or "all" (the mean
        over these and the rows before them).
      distilled: a second linear layer on row 1; the logits are the mean of both.
      representation_size: width of a tanh layer before the classifier.
      norm_eps: epsilon of a LayerNorm on the pooled features (timm's `fc_norm`), None for none.
    """

    classes: int
    pool: str = "token"
    distilled: bool = False
    representation_size: int | None = None
    norm_eps: float | None = None

    @nn.compact
    def __call__(self, tokens: Tokens) -> tuple[Array, Array | None]:
        """`(logits [B, classes], heads [2, B, classes] or None)`, float32."""
        x = self._pooled(tokens).astype(jnp.float32)
        x = x if self.norm_eps is None else nn.LayerNorm(epsilon=self.norm_eps, name="norm")(x)
        second = tokens.x[:, 1].astype(jnp.float32) if self.distilled else None
        if self.representation_size:
            x = jnp.tanh(layers.dense(self.representation_size, name="pre_logits")(x))
        if not self.classes:
            return (x if second is None else (x + second) / 2), None
        logits = layers.dense(self.classes, name="cls")(x)
        if second is None:
            return logits, None
        heads = jnp.stack([logits, layers.dense(self.classes, name="dist")(second)])
        return heads.mean(axis=0), heads

    def _pooled(self, tokens: Tokens) -> Array:
        if self.pool == "token":
            check_pool(self.pool, tokens.prefix)
            return tokens.x[:, 0]
        if self.pool not in ("mean", "all"):
            raise ValueError(f"pool must be token, mean or all, got {self.pool!r}")
        rows = tokens.patches if self.pool == "mean" else tokens.x
        if tokens.alive is None:
            return rows.mean(axis=1)
        alive = tokens.alive if self.pool == "mean" else attend.with_prefix(tokens.alive, tokens.prefix)
        weight = alive.astype(tokens.x.dtype)[..., None]
        total = weight.sum(axis=1)
        return (rows * weight).sum(axis=1) / jnp.where(total > 0, total, 1.0)


def check_pool(pool: str, prefix: int) -> None:
    """Raises ValueError for a pool that final tokens with `prefix` rows ahead do not have."""
    if pool == "token" and not prefix:
        raise ValueError("pool='token' needs a class token; use pool='mean'")


def with_dense(logits: Array, dense: Array, alive: Array | None, weight: float) -> Array:
    """`logits [B, K]` plus `weight` times the largest of each class over the tokens alive.

    Args:
      dense: `[B, N, K]` logits of the patch rows.
      alive: `[B, N]`, or None for all; a row with none alive adds nothing.
    """
    if alive is None:
        return logits + weight * dense.max(axis=1)
    there = alive > 0.5
    best = jnp.where(there[..., None], dense, jnp.finfo(dense.dtype).min).max(axis=1)
    return logits + weight * jnp.where(there.any(axis=1, keepdims=True), best, 0.0)
