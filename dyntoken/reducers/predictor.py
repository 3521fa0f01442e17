"""Networks that learn which patches matter: DynamicViT's of whole rows, SPViT's of each attention head's channels."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.ops import backend

Array = jax.Array


class Predictor(nn.Module):
    """DynamicViT's prediction module (section 3.2, `PredictorLG`).

    Half of the channels stay local, the other half becomes the mean over the
    rows alive; output index 0 means keep. Always float32: in bfloat16 almost
    half of the images have ties at the cut.

    Attributes:
      eps: LayerNorm epsilon.
      head: "local+global", or "local": every channel stays that of its row (same parameters).
    """

    eps: float = 1e-5
    head: str = "local+global"

    @nn.compact
    def __call__(self, x: Array, alive: Array | None = None) -> Array:
        """Log-probabilities `[B, n, 2]` of patch rows `x [B, n, C]`, `alive [B, n]`."""
        return nn.log_softmax(_logits(x.astype(jnp.float32), alive, self.eps, self.head), axis=-1)


class HeadPredictor(nn.Module):
    """SPViT, ECCV 2022, section 3.2; PeiyanFlying/SPViT, `vit_l2_3keep_senet.py`.

    The channels are cut into heads. One network, the same for each, scores every
    head's slice as DynamicViT's predictor does whole rows; the means over each
    slice give the heads' weights. Always float32.

    Attributes:
      heads: number of slices, which divides the channels.
      eps, head: as of `Predictor`.
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
        logits = _logits(x, alive, self.eps, self.head)
        sums = weight.sum(axis=2)
        score = (weight * nn.log_softmax(logits, axis=-1)).sum(axis=2) / sums
        keep = (weight * nn.softmax(logits, axis=-1)).sum(axis=2) / sums
        return score, keep[..., 0]


def _logits(x: Array, alive: Array | None, eps: float, head: str) -> Array:
    """(keep, drop) of rows `x [B, n, ..., C]`, `[B, n, ..., 2]`; the layers are children of the calling module."""
    width = x.shape[-1]
    half = width // 2
    x = layers.LayerNorm(epsilon=eps, name="in_conv_0")(x)
    first, second = layers.dense(width, name="in_conv_1"), layers.dense(half, name="out_conv_0")
    # A TPU would cut the first product and join its halves, copies that take longer than the product.
    if backend.platform() == "tpu" and head != "local" and first.has_variable("params", "kernel"):
        local, shared = (
            layers.gelu(_part(first, x, columns=part)) for part in (slice(half), slice(half, None))
        )
        of_mean = _part(second, _mean(shared, alive), rows=slice(half, None))
        x = _part(second, local, rows=slice(half), bias=False) + of_mean
    else:
        y = layers.gelu(first(x))
        local, shared = y[..., :half], y[..., half:]
        shared = shared if head == "local" else jnp.broadcast_to(_mean(shared, alive), shared.shape)
        x = second(jnp.concatenate([local, shared], axis=-1))
    x = layers.gelu(layers.dense(max(1, width // 4), name="out_conv_2")(layers.gelu(x)))
    return layers.dense(2, name="out_conv_4")(x)


def _part(
    layer: nn.Dense, x: Array, rows: slice = slice(None), columns: slice = slice(None), bias: bool = True
) -> Array:
    """What some rows and columns of a layer's kernel make of `x`."""
    params = layer.variables["params"]
    y = x @ params["kernel"][rows, columns]
    return y + jnp.expand_dims(params["bias"][columns], range(y.ndim - 1)) if bias else y


def _mean(x: Array, alive: Array | None) -> Array:
    """The mean over the rows alive of `x [B, n, ..., C]`, `[B, 1, ..., C]`."""
    if alive is None:
        return x.mean(axis=1, keepdims=True)
    weight = alive.astype(jnp.float32).reshape(alive.shape + (1,) * (x.ndim - 2))
    total = weight.sum(axis=1, keepdims=True)
    # A sample that lost every patch is 0/0 in the official code.
    return (x * weight).sum(axis=1, keepdims=True) / jnp.where(total > 0, total, 1.0)
