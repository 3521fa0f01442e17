"""Scoring rules: which patches matter. Higher scores are kept first."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.ops import sample
from dyntoken.types import Attended, Tokens

Array = jax.Array


@flax.struct.dataclass
class Scores:
    """What a scoring rule says of n patch rows.

    Attributes:
      rank: `[B, n]` float32; the selection keeps the largest.
      importance: `[B, n]` float32, non-negative shares that sum to at most 1
        over the rows alive; weights of the fused token.
      log_probs: `[B, n, 2]` (keep, drop) of a learnt decision, else None.
    """

    rank: Array
    importance: Array
    log_probs: Array | None = None


class Predictor(nn.Module):
    """DynamicViT's prediction module (section 3.2, `PredictorLG`).

    Half of the channels stay local, the other half becomes the mean over the
    rows alive; output index 0 means keep. Always float32: in bfloat16 almost
    half of the images have ties at the cut.

    Attributes:
      eps: LayerNorm epsilon.
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, alive: Array | None = None) -> Array:
        """Log-probabilities `[B, n, 2]` of patch rows `x [B, n, C]`, `alive [B, n]`."""
        width = x.shape[-1]
        x = x.astype(jnp.float32)
        x = nn.LayerNorm(epsilon=self.eps, name="in_conv_0")(x)
        x = layers.gelu(layers.dense(width, name="in_conv_1")(x))
        local, shared = x[..., : width // 2], x[..., width // 2 :]
        if alive is None:
            pooled = shared.mean(axis=1, keepdims=True)
        else:
            weight = alive.astype(jnp.float32)[..., None]
            total = weight.sum(axis=1, keepdims=True)
            # A sample that lost every patch is 0/0 in the official code.
            pooled = (shared * weight).sum(axis=1, keepdims=True) / jnp.where(total > 0, total, 1.0)
        x = jnp.concatenate([local, jnp.broadcast_to(pooled, shared.shape)], axis=-1)
        x = layers.gelu(layers.dense(width // 2, name="out_conv_0")(x))
        x = layers.gelu(layers.dense(width // 4, name="out_conv_2")(x))
        return nn.log_softmax(layers.dense(2, name="out_conv_4")(x), axis=-1)


def predictor(
    tokens: Tokens, seen: Attended | None, draws: sample.Draws | None, stage: int, eps: float = 1e-5
) -> Scores:
    """DynamicViT and dTPS: a small network on the residual stream. Has parameters."""
    log_probs = Predictor(eps, name="predictor")(tokens.patches, tokens.alive)
    keep = jnp.exp(log_probs[..., 0])
    return Scores(rank=log_probs[..., 0], importance=_shares(keep, tokens), log_probs=log_probs)


def class_attention(tokens: Tokens, seen: Attended | None, draws: sample.Draws | None, stage: int) -> Scores:
    """EViT and eTPS: the class token's attention in the same block."""
    if seen is None or seen.cls is None:
        raise ValueError(
            "class-attention scores need a class token and a site inside a block; "
            "score='predictor' and score='random' work without"
        )
    return Scores(rank=seen.cls, importance=seen.cls)


def random(tokens: Tokens, seen: Attended | None, draws: sample.Draws | None, stage: int) -> Scores:
    """Uniform scores: the control of every robustness study."""
    draws = draws if draws is not None else _fixed(tokens)
    scores = draws.uniform((tokens.count,), stage, 1)
    return Scores(rank=scores, importance=_shares(scores, tokens))


def shuffled(scores: Scores, tokens: Tokens, draws: sample.Draws | None, stage: int) -> Scores:
    """The same scores on other patches: permuted among the rows alive of an image."""
    draws = draws if draws is not None else _fixed(tokens)
    alive = jnp.ones(scores.rank.shape) if tokens.alive is None else tokens.alive
    rows = sample.permutation(alive, draws, stage, 2)

    def permute(values: Array) -> Array:
        index = rows.reshape(rows.shape + (1,) * (values.ndim - 2))
        return jnp.take_along_axis(values, index, axis=1)

    return jax.tree.map(permute, scores)


def _shares(weight: Array, tokens: Tokens) -> Array:
    weight = weight if tokens.alive is None else weight * tokens.alive
    total = weight.sum(axis=1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1.0)


def _fixed(tokens: Tokens) -> sample.Draws:
    """Without an rng the draw is a fixed one, so that evaluation is deterministic."""
    return sample.Draws(jax.random.key(0), jnp.arange(tokens.x.shape[0], dtype=jnp.int32))


SCORERS = {"predictor": predictor, "class_attention": class_attention, "random": random}
