"""T2T-ViT: patches grow out of overlapping windows by small attention layers."""

from __future__ import annotations

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.backbones.isotropic import Isotropic
from dyntoken.backbones.sizes import pair
from dyntoken.nn import layers
from dyntoken.nn.trunk import Context
from dyntoken.ops import attend, unfold
from dyntoken.schema import Count, Positive, Size

Array = jax.Array
NORM_EPS = 1e-5  # torch's default, which the official modules keep
PERFORMER_EPS = 1e-8  # yitu-opensource/T2T-ViT, token_performer.py
# (pixels, tokens) of one axis -> kernel, stride, padding, where DVT's own differ from `first_split`.
SPLITS = {(224, 10): (11, 6, 5)}


class TokenTransformer(nn.Module):
    """One T2T step with softmax attention, `[B, n, C]` -> `[B, n, width]`.

    One head. The logits are scaled by the width of the *input*, C ** -0.5, and
    the residual adds the values, not the input, as the official code does.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = layers.LayerNorm(epsilon=NORM_EPS, dtype=self.dtype, name="norm1")(x)
        x = _OneHead(self.width, self.dtype, name="attn")(y)
        y = layers.LayerNorm(epsilon=NORM_EPS, dtype=self.dtype, name="norm2")(x)
        return x + layers.Mlp(self.width, dtype=self.dtype, name="mlp")(y)


class _OneHead(nn.Module):
    """Attention from C to `width` channels; values as the residual."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        qkv = layers.dense(3 * self.width, name="qkv", dtype=self.dtype, use_bias=False)(x)
        q, k, v = jnp.split(qkv[:, None], 3, axis=-1)  # each [B, 1, n, width]
        y = attend.attention(q, k, v, scale=x.shape[-1] ** -0.5)
        return v[:, 0] + layers.dense(self.width, name="proj", dtype=self.dtype)(y[:, 0])


class TokenPerformer(nn.Module):
    """One T2T step with linear attention, `[B, n, C]` -> `[B, n, width]`.

    Performer features exp(w x - |x|^2 / 2) / sqrt(m) with a fixed random w, m =
    width / 2. Runs in float32 whatever the compute type: with its epsilon of
    1e-8 half precision gives NaN (its issues 19, 26, 69).
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        m = self.width // 2
        w = self.param("w", _orthogonal, (m, self.width))
        w = jax.lax.stop_gradient(w)
        x = x.astype(jnp.float32)
        kqv = layers.dense(3 * self.width, name="kqv")(layers.LayerNorm(epsilon=NORM_EPS, name="norm1")(x))
        k, q, v = jnp.split(kqv, 3, axis=-1)  # each [B, n, width]
        k, q = _features(k, w), _features(q, w)  # [B, n, m]
        mass = jnp.einsum("bnm,bm->bn", q, k.sum(axis=1))
        moved = jnp.einsum("bnc,bnm->bcm", v, k)
        y = jnp.einsum("bnm,bcm->bnc", q, moved) / (mass[..., None] + PERFORMER_EPS)
        x = v + layers.dense(self.width, name="proj")(y)
        y = layers.dense(self.width, name="mlp_0")(layers.LayerNorm(epsilon=NORM_EPS, name="norm2")(x))
        return (x + layers.dense(self.width, name="mlp_2")(layers.gelu(y))).astype(self.dtype)


def _features(x: Array, w: Array) -> Array:
    """Positive random features `[B, n, m]` of the softmax kernel."""
    square = (x * x).sum(axis=-1, keepdims=True) / 2
    return jnp.exp(jnp.einsum("bnc,mc->bnm", x, w) - square) / math.sqrt(w.shape[0])


def _orthogonal(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Orthonormal rows times sqrt(m), as the official code draws w."""
    return nn.initializers.orthogonal(scale=math.sqrt(shape[0]))(key, shape, dtype)


STEPS = {"performer": TokenPerformer, "transformer": TokenTransformer}


class TokensToToken(nn.Module):
    """Soft split, T2T step, soft split, T2T step, soft split, projection.

    `[B, H, W, Cin]` -> `[B, N, width]`; section 3.1 of the paper.

    Attributes:
      kind: row of `STEPS`, or "convolution": three convolutions in place of splits and steps.
      kernel, stride, padding: of the first split, (vertical, horizontal); the
        other two have windows of 3, stride 2, padding 1.
      token_dim: channels between the splits.
    """

    kind: str
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    token_dim: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        if self.kind == "convolution":
            return self._convolved(images)
        x = unfold.unfold(images, self.kernel, self.stride, self.padding)
        for number in (1, 2):
            batch, high, wide, channels = x.shape
            step = STEPS[self.kind](self.token_dim, self.dtype, name=f"attention{number}")
            x = step(x.reshape(batch, high * wide, channels)).reshape(batch, high, wide, self.token_dim)
            x = unfold.unfold(x, (3, 3), (2, 2), (1, 1))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return layers.dense(self.width, name="project", dtype=self.dtype)(x)

    def _convolved(self, x: Array) -> Array:
        small = ((3, 3), (2, 2), (1, 1))
        for name, width, (kernel, stride, padding) in (
            ("soft_split0", self.token_dim, (self.kernel, self.stride, self.padding)),
            ("soft_split1", self.token_dim, small),
            ("project", self.width, small),
        ):
            init = layers.torch_uniform(kernel[0] * kernel[1] * x.shape[-1])
            options = {"kernel_init": init, "bias_init": init, "dtype": self.dtype, "name": name}
            x = nn.Conv(width, kernel, stride, [(p, p) for p in padding], **options)(x)
        return x.reshape(x.shape[0], -1, self.width)


class T2T(Isotropic):
    """T2T-ViT (Yuan et al. 2021; yitu-opensource/T2T-ViT).

    Positions are a sinusoid, and like the performer's random features they are
    parameters without gradient: name both in `optim.frozen`
    (`("pos_embed$", r"attention\\d/w$")`) so that weight decay leaves them alone.

    Attributes (besides those of `Isotropic`):
      tokens: wanted (rows, columns) of tokens; None is one per 16 pixels.
      tokens_type: "performer" or "transformer" T2T steps, or "convolution" (the paper's comparison).
      token_dim: channels between the soft splits.
    """

    naming = "t2t"

    mlp_ratio: Positive = 3.0
    qkv_bias: bool = False
    norm_eps: Positive = NORM_EPS
    tokens: Size | None = None
    tokens_type: Literal["performer", "transformer", "convolution"] = "performer"
    token_dim: Count = 64

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        if self.tokens is not None:
            return pair(self.tokens)
        return tuple(max(1, -(-size // 16)) for size in pair(self.img_size))

    @property
    def split(self) -> tuple[tuple[int, int], ...]:
        """(kernel, stride, padding) of the first split, each (vertical, horizontal)."""
        axes = [first_split(s, n) for s, n in zip(pair(self.img_size), self.grid, strict=True)]
        return tuple(zip(*axes, strict=True))

    def check(self) -> None:
        super().check()
        _ = self.split

    def setup_stem(self) -> None:
        """The tokens-to-token module."""
        options = (self.tokens_type, self.width, *self.split)
        self.tokens_to_token = TokensToToken(*options, self.token_dim, self.dtype)

    def stem_rows(self, images: Array, context: Context) -> Array:
        return self.tokens_to_token(images)

    def positions(self) -> Array:
        """The sinusoid, in the tree because official checkpoints hold it."""
        rows = self.prefix + self.grid[0] * self.grid[1]
        table = self.param("pos_embed", lambda key: jnp.asarray(sinusoid(rows, self.width))[None])
        return jax.lax.stop_gradient(table)


def sinusoid(rows: int, width: int) -> np.ndarray:
    """Sinusoidal positions `[rows, width]` float32 over the flat row number, class token first."""
    channel = np.arange(width)
    angle = np.arange(rows)[:, None] / np.power(10000, 2 * (channel // 2) / width)[None]
    return np.where(channel[None] % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)


def first_split(size: int, tokens: int) -> tuple[int, int, int]:
    """(kernel, stride, padding) of the first split along one axis.

    Two more splits of stride 2 follow, so it must give about four windows per
    token. Stride ceil(size / (4 tokens)) and a kernel 7/4 of it, which is the
    official 7, 4, 2 at 16 pixels per token and DVT's 14, 8, 3 at 32; where no
    padding fits, the smaller stride and the kernel that covers the image.

    Raises:
      ValueError: the image is too small.
    """
    if (size, tokens) in SPLITS:
        return SPLITS[size, tokens]
    if tokens < 1 or size < 4 * tokens:
        raise ValueError(f"{tokens} T2T tokens need at least {4 * tokens} pixels, got {size}")
    stride = -(-size // (4 * tokens))
    kernel = -(-7 * stride // 4)
    centre = -(-(kernel - stride) // 2)
    for padding in sorted(range(kernel), key=lambda p: (abs(p - centre), p)):
        windows = unfold.count(size, kernel, stride, padding)
        if -(-windows // 4) == tokens:
            return kernel, stride, padding
    stride = size // (4 * tokens)
    return size - stride * (4 * tokens - 1), stride, 0
