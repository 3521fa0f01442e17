"""From final tokens to logits."""

from __future__ import annotations

from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.nn.spec import Spec
from dyntoken.ops import attend, sample
from dyntoken.types import Tokens

Array = jax.Array
Pool = Literal["token", "mean", "all", "max", "avgmax", "catavgmax", "token_mean", "map", "prr"]
Representation = Literal[
    "tanh",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "relu",
    "relu6",
    "leaky_relu",
    "silu",
    "mish",
    "sigmoid",
    "identity",
]
REPRESENTATIONS = {name: layers.ACTIVATIONS[name] for name in get_args(Representation)}
HEAD = 1 << 20  # a layer number that no block has; it keys the head's draws


class AttentionPool(nn.Module):
    """One learnt query attends to the rows; an MLP with a residual follows (timm's `AttentionPoolLatent`).

    Attributes:
      heads, mlp_ratio: as a block's.
      norm_eps: epsilon of the LayerNorm before the MLP.
      act: row of `layers.ACTIVATIONS`.
    """

    heads: int
    mlp_ratio: float
    norm_eps: float
    act: str

    @nn.compact
    def __call__(self, x: Array, alive: Array | None) -> Array:
        """Rows `[B, T, C]`, of which `alive [B, T]` (None: all) are read, to `[B, C]`."""
        batch, _, width = x.shape
        latent = self.param("latent", layers.trunc_normal(width**-0.5), (1, 1, width))
        q = layers.dense(width, name="q")(jnp.broadcast_to(latent, (batch, 1, width)))
        kv = layers.dense(2 * width, name="kv")(x)
        y = _attend(q, *jnp.split(kv, 2, axis=-1), self.heads, alive)[:, 0]
        y = layers.dense(width, name="proj")(y)
        normed = layers.LayerNorm(epsilon=self.norm_eps, name="norm")(y)
        act = layers.ACTIVATIONS[self.act]
        return y + layers.Mlp(int(width * self.mlp_ratio), activation=act, name="mlp")(normed)


class PatchRefinement(nn.Module):
    """Self-attention of the rows without parameters, then the class token or the mean (timm's `AttentionPoolPrr`).

    Attributes:
      heads: of the attention.
      token: row 0 is a class token.
    """

    heads: int
    token: bool

    def __call__(self, x: Array, alive: Array | None) -> Array:
        """As `AttentionPool`."""
        y = _attend(x, x, x, self.heads, alive)
        return y[:, 0] if self.token else _mean(y, alive)


def _attend(q: Array, k: Array, v: Array, heads: int, alive: Array | None) -> Array:
    """Attention of rows `q [B, Q, C]` to rows `k` and `v [B, T, C]`, those of them that are alive."""
    batch, _, width = k.shape
    q, k, v = (jnp.swapaxes(rows.reshape(batch, -1, heads, width // heads), 1, 2) for rows in (q, k, v))
    logits = attend.logits(q, k, scale=(width // heads) ** -0.5)
    if alive is not None:
        logits = jnp.where(alive[:, None, None] > 0.5, logits, jnp.finfo(logits.dtype).min)
    y = jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(logits), v)
    return jnp.swapaxes(y, 1, 2).reshape(batch, -1, width)


class ClassHead(nn.Module):
    """Pools the tokens and classifies them.

    Attributes:
      classes: 0 returns the pooled features instead of logits.
      pool: "token" (row 0), "mean" (over the patch rows alive), "all" (the mean
        over these and the rows before them), "max", "avgmax" (the mean of both),
        "catavgmax" (one after the other), "token_mean" (row 0, then the mean: DINOv2's linear
        classifier), "map" or "prr" (`attention`).
      distilled: a second linear layer on row 1; the logits are the mean of both.
      representation_size: width of a layer before the classifier.
      norm_eps: epsilon of a LayerNorm on the pooled features (timm's `fc_norm`), None for none.
      representation_act: row of `REPRESENTATIONS`.
      dropout: before the classifier.
      prefix_too: pooling reads the rows before the patches, too.
      attention: recipe of an `AttentionPool` for pool="map", of a `PatchRefinement` for "prr".
      token_norm_eps: epsilon of a norm on the class token, which has a classifier of its
        own then: training returns both as `heads`, evaluation does without it (Evo-ViT).
    """

    classes: int
    pool: str = "token"
    distilled: bool = False
    representation_size: int | None = None
    norm_eps: float | None = None
    representation_act: str = "tanh"
    dropout: float = 0.0
    prefix_too: bool = False
    attention: Spec | None = None
    token_norm_eps: float | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        draws: sample.Draws | None = None,
        *,
        train: bool = False,
        classify: bool = True,
    ) -> tuple[Array, Array | None]:
        """`(logits [B, classes], heads [2, B, classes] or None)`, float32.

        Args:
          draws: turn dropout on.
          train: training mode, see `token_norm_eps`.
          classify: False returns the pooled features, as `classes` = 0 does.
        """
        x = self._pooled(tokens).astype(jnp.float32)
        x = x if self.norm_eps is None else layers.LayerNorm(epsilon=self.norm_eps, name="norm")(x)
        second = tokens.x[:, 1].astype(jnp.float32) if self.distilled else None
        if self.representation_size:
            x = layers.dense(self.representation_size, name="pre_logits")(x)
            x = REPRESENTATIONS[self.representation_act](x)
        x = layers.drop(x, self.dropout, draws, HEAD, 0)
        if second is not None:
            second = layers.drop(second, self.dropout, draws, HEAD, 1)
        if not (self.classes and classify):
            return (x if second is None else (x + second) / 2), None
        logits = layers.dense(self.classes, name="cls")(x)
        if self.token_norm_eps is not None and (train or self.is_initializing()):
            token = tokens.x[:, 0].astype(jnp.float32)
            token = layers.LayerNorm(epsilon=self.token_norm_eps, name="token_norm")(token)
            return logits, jnp.stack([logits, layers.dense(self.classes, name="token")(token)])
        if second is None:
            return logits, None
        heads = jnp.stack([logits, layers.dense(self.classes, name="dist")(second)])
        return heads.mean(axis=0), heads

    def _pooled(self, tokens: Tokens) -> Array:
        check_pool(self.pool, tokens.prefix)
        if self.pool == "token":
            return tokens.x[:, 0]
        if self.pool == "token_mean":
            return jnp.concatenate([tokens.x[:, 0], _mean(tokens.patches, tokens.alive)], axis=-1)
        whole = self.prefix_too or self.pool in ("all", "prr")
        rows, alive = tokens.x if whole else tokens.patches, tokens.alive
        if whole and alive is not None:
            alive = attend.with_prefix(alive, tokens.prefix)
        if self.attention is not None:
            return self.attention(name="attn_pool")(rows.astype(jnp.float32), alive)
        return POOLS[self.pool](rows, alive)


def _mean(rows: Array, alive: Array | None) -> Array:
    if alive is None:
        return rows.mean(axis=1)
    weight = alive.astype(rows.dtype)[..., None]
    total = weight.sum(axis=1)
    return (rows * weight).sum(axis=1) / jnp.where(total > 0, total, 1.0)


def _max(rows: Array, alive: Array | None) -> Array:
    """The largest of each channel; a row with none alive gives 0."""
    if alive is None:
        return rows.max(axis=1)
    there = alive[..., None] > 0.5
    best = jnp.where(there, rows, jnp.finfo(rows.dtype).min).max(axis=1)
    return jnp.where(there.any(axis=1), best, 0.0)


# Rows `[B, T, C]` and which of them are alive, `[B, T]` or None for all, to `[B, C]` (or `[B, 2 C]`).
POOLS = {
    "mean": _mean,
    "all": _mean,
    "max": _max,
    "avgmax": lambda rows, alive: 0.5 * (_mean(rows, alive) + _max(rows, alive)),
    "catavgmax": lambda rows, alive: jnp.concatenate([_mean(rows, alive), _max(rows, alive)], axis=-1),
}


def check_pool(pool: str, prefix: int) -> None:
    """Raises ValueError for a pool that final tokens with `prefix` rows ahead do not have."""
    if pool in ("token", "token_mean") and not prefix:
        raise ValueError(f"pool={pool!r} needs a class token; use pool='mean'")


def with_dense(logits: Array, dense: Array, alive: Array | None, weight: float) -> Array:
    """`logits [B, K]` plus `weight` times the largest of each class over the tokens alive.

    Args:
      dense: `[B, N, K]` logits of the patch rows.
      alive: `[B, N]`, or None for all; a row with none alive adds nothing.
    """
    return logits + weight * _max(dense, alive)
