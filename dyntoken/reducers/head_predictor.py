"""SPViT's selector: a small predictor per attention head, weighed by the heads' means."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import layers

Array = jax.Array


class HeadPredictor(nn.Module):
    """SPViT, ECCV 2022, section 3.2; PeiyanFlying/SPViT, `vit_l2_3keep_senet.py`.

    The channels are cut into heads. One network, the same for each, scores every
    head's slice as DynamicViT's predictor does whole rows; the means over each
    slice give the heads' weights. Always float32.

    Attributes:
      heads: number of slices, which divides the channels.
      eps: LayerNorm epsilon.
      head: as of `score.Predictor`.
    """

    heads: int
    eps: float = 1e-5
    head: str = "local+global"

    @nn.compact
    def __call__(self, x: Array, alive: Array | None = None) -> tuple[Array, Array]:
        """Of patch rows `x [B, n, C]`, `alive [B, n]`: the weighted means over the heads of

        the log-probabilities, `[B, n, 2]` (keep, drop), and of the keep probability, `[B, n]`.
        """
        batch, rows, width = x.shape
        if width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the {width} channels: give other heads=")
        x = x.astype(jnp.float32).reshape(batch, rows, self.heads, -1)
        weight = layers.gelu(layers.dense(max(1, self.heads // 2), name="senet_0")(x.mean(axis=-1)))
        weight = nn.sigmoid(layers.dense(self.heads, name="senet_2")(weight))[..., None]  # [B, n, heads, 1]
        size = width // self.heads
        x = layers.LayerNorm(epsilon=self.eps, name="in_conv_0")(x)
        x = layers.gelu(layers.dense(size, name="in_conv_1")(x))
        local, shared = x[..., : size // 2], x[..., size // 2 :]
        here = jnp.ones((batch, rows)) if alive is None else alive.astype(jnp.float32)
        total = here.sum(axis=1)[:, None, None, None]
        pooled = (shared * here[:, :, None, None]).sum(axis=1, keepdims=True) / jnp.where(total > 0, total, 1)
        pooled = shared if self.head == "local" else jnp.broadcast_to(pooled, shared.shape)
        x = jnp.concatenate([local, pooled], axis=-1)
        x = layers.gelu(layers.dense(size // 2, name="out_conv_0")(x))
        x = layers.gelu(layers.dense(max(1, size // 4), name="out_conv_2")(x))
        logits = layers.dense(2, name="out_conv_4")(x)
        sums = weight.sum(axis=2)
        score = (weight * nn.log_softmax(logits, axis=-1)).sum(axis=2) / sums
        keep = (weight * nn.softmax(logits, axis=-1)).sum(axis=2) / sums
        return score, keep[..., 0]
