"""CvT: a pyramid of overlapping patches; convolutions make queries, keys and values."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.backbones.sizes import of_stage, pair
from dyntoken.backbones.staged_regrown import RegrownStages
from dyntoken.nn import layers
from dyntoken.nn.batchnorm import BatchNorm
from dyntoken.nn.spatial import SpatialBlock, SpatialMap
from dyntoken.nn.spec import Spec
from dyntoken.ops import attend, sample, select, unfold
from dyntoken.schema import Count, Natural, Positive
from dyntoken.types import Attended

Array = jax.Array
Projection = Literal["dw_bn", "avg", "linear"]


class ConvEmbed(nn.Module):
    """Overlapping patches, then a norm: `[B, H, W, Cin]` -> `[B, h, w, width]`."""

    width: int
    kernel: int
    stride: int
    padding: int
    norm_eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        options = ((self.kernel,) * 2, self.stride, self.padding)
        x = layers.conv(x, self.width, *options, name="proj", dtype=self.dtype)
        return layers.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)


class ConvProjection(nn.Module):
    """A map as rows, `[B, H, W, C]` -> `[B, h * w, C]`.

    Attributes:
      method: "dw_bn" (depthwise convolution and BatchNorm), "avg" (`average_pool`)
        or "linear" (the cells as they are).
    """

    kernel: int
    stride: int
    padding: int
    frozen: bool = False
    dtype: Any = jnp.float32
    method: str = "dw_bn"

    @nn.compact
    def __call__(self, cells: Array, train: bool) -> Array:
        options = (self.kernel, self.stride, self.padding)
        if self.method != "dw_bn":
            x = cells if self.method == "linear" else average_pool(cells, *options)
            return x.reshape(x.shape[0], -1, x.shape[-1])
        x = layers.DepthwiseConv(*options, use_bias=False, dtype=self.dtype, name="conv")(cells)
        x = BatchNorm(frozen=self.frozen, dtype=self.dtype, name="bn")(x, train)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class ConvAttention(nn.Module):
    """Attention whose queries, keys and values are convolved on a map; class tokens pass by.

    Attributes (besides those of `nn.attention.Attention`):
      kernel: of the convolutions, odd.
      stride, padding: of those of keys and values; queries keep the map's size.
      frozen: see `BatchNorm`.
      method: of the projections, see `ConvProjection`; with "avg" queries are the cells themselves.
    """

    heads: int
    qkv_bias: bool = True
    kernel: int = 3
    stride: int = 2
    padding: int = 1
    frozen: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32
    attn_dropout: float = 0.0
    method: str = "dw_bn"

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        spatial_map: SpatialMap,
        prefix: int = 0,
        train: bool = False,
        return_scores: bool = False,
        draws: sample.Draws | None = None,
        path: tuple[int, ...] = (),
    ) -> tuple[Array, Attended | None]:
        """Attends `x [B, T, C]`.

        Args (the others, and the result, are those of `Attention`):
          spatial_map: the patches as a map; a query is read where a row lies on it.
        """
        batch, rows, width = x.shape
        grid = spatial_map.cells.shape[1:3]
        q, k, v = (self._projected(name, x[:, :prefix], spatial_map, train) for name in "qkv")
        scale = width**-0.5  # of all heads together, as official
        seen = None
        if return_scores or (draws is not None and self.attn_dropout > 0.0):
            p = attend.normalise(attend.logits(q, k, scale=scale), policy=None, train=train)
            p = layers.drop(p, self.attn_dropout, draws, *path, 0)
            y = jnp.einsum("bhqk,bhkd->bhqd", p.astype(v.dtype), v)
            cls = attend.class_attention(p, prefix) if prefix else None
            seen = Attended(cls=None if cls is None else self._of_patches(cls, grid))
        else:
            y = attend.attention(q, k, v, scale=scale)
        y = jnp.swapaxes(y, 1, 2).reshape(batch, rows, width)
        y = layers.dense(width, name="proj", dtype=self.dtype)(y)
        return layers.drop(y, self.dropout, draws, *path), seen

    def _projected(self, name: str, first: Array, spatial_map: SpatialMap, train: bool) -> Array:
        """Queries, keys or values `[B, heads, rows, head_dim]`."""
        stride, padding = (1, self.kernel // 2) if name == "q" else (self.stride, self.padding)
        method = "linear" if name == "q" and self.method == "avg" else self.method
        options = (self.kernel, stride, padding, self.frozen, self.dtype, method)
        x = ConvProjection(*options, name=f"conv_proj_{name}")(spatial_map.cells, train)
        if name == "q" and spatial_map.place is not None:
            x = select.take(x, spatial_map.place)
        x = jnp.concatenate([first, x], axis=1)
        x = layers.dense(x.shape[-1], name=f"proj_{name}", dtype=self.dtype, use_bias=self.qkv_bias)(x)
        return jnp.swapaxes(x.reshape(*x.shape[:2], self.heads, -1), 1, 2)

    def _of_patches(self, cls: Array, grid: tuple[int, int]) -> Array:
        """The class token's attention to keys `[B, keys]` as one value per patch, `[B, N]`.

        With strided keys a patch between two of them gets their mean. No
        official code says how; this is ours.
        """
        axes = [key_weights(n, self.kernel, self.stride, self.padding, self.method) for n in grid]
        cls = cls.reshape(-1, *(weights.shape[1] for weights in axes))
        with jax.named_scope("resize"):
            rows, columns = map(jnp.asarray, axes)
            cls = jnp.einsum("yh,bhw->byw", rows, cls, precision=select.HIGHEST)
            cls = jnp.einsum("xw,byw->byx", columns, cls, precision=select.HIGHEST)
        return cls.reshape(cls.shape[0], -1)


def key_weights(cells: int, kernel: int, stride: int, padding: int, method: str = "dw_bn") -> np.ndarray:
    """Weights `[cells, keys]` float32 of a linear interpolation between the centres of keys, along one axis."""
    if method == "linear":
        return np.eye(cells, dtype=np.float32)
    keys = (_pooled if method == "avg" else unfold.count)(cells, kernel, stride, padding)
    at = (np.arange(cells) + padding - (kernel - 1) / 2) / stride
    at = np.clip(at, 0, keys - 1)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(keys)[None])).astype(np.float32)


def _pooled(size: int, kernel: int, stride: int, padding: int) -> int:
    """Outputs of torch's average pooling with `ceil_mode` along an axis: the last window may overhang."""
    count = -(-(size + 2 * padding - kernel) // stride) + 1
    return count - ((count - 1) * stride >= size + padding)


def average_pool(x: Array, kernel: int, stride: int, padding: int) -> Array:
    """torch's `AvgPool2d(..., ceil_mode=True)` of `[B, H, W, C]`: padding counts as cells, an overhang does not."""
    grid = x.shape[1:3]
    over = [(_pooled(n, kernel, stride, padding) - 1) * stride + kernel - n - 2 * padding for n in grid]
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    ends = ((0, 0), *((0, max(0, o)) for o in over), (0, 0))

    def sums(cells: Array) -> Array:
        return jax.lax.reduce_window(
            cells, 0.0, jax.lax.add, (1, kernel, kernel, 1), (1, stride, stride, 1), ends
        )

    return (sums(x.astype(jnp.float32)) / sums(jnp.ones_like(x[:1, :, :, :1], jnp.float32))).astype(x.dtype)


class CvTBlock(SpatialBlock):
    """`SpatialBlock` with convolved queries, keys and values."""

    kernel: int = 3
    stride: int = 2
    padding: int = 1
    frozen: bool = False
    method: str = "dw_bn"
    act: str = "quick_gelu"

    def attention(self) -> nn.Module:
        options = (self.kernel, self.stride, self.padding, self.frozen, self.dropout, self.dtype)
        return ConvAttention(self.heads, self.qkv_bias, *options, self.attn_dropout, self.method)


class CvT(RegrownStages):
    """CvT (Wu et al. 2021, "CvT: Introducing Convolutions to Vision Transformers"; microsoft/CvT).

    Any image size will do; odd maps round up. There are no positions. Queries,
    keys and values come from depthwise convolutions on the whole map, whatever
    was dropped: they, and the embeddings, do not shrink, nor do the keys. The
    BatchNorm behind them shifts the zeros of dropped cells, and its training
    statistics count these cells; `dropped="last"` lets them keep their value.

    Attributes (besides those of `RegrownStages`):
      patch_sizes, patch_strides, patch_paddings: of each stage's embedding.
      kernels: of the convolutions in its blocks, odd.
      kv_strides, kv_paddings: of those of keys and values.
      projection: how queries, keys and values come from the map, see `ConvProjection`; one, or one per stage.
      activation: of the MLPs, see `layers.ACTIVATIONS`.
      class_tokens: whether a stage has a class token, which ends with it; the
        last one's is classified (without: pool="mean").
      frozen_stats: training leaves the BatchNorm statistics alone and uses them.
      drop_path: one rate is that of the last stage, whose blocks it grows over.
    """

    naming = "cvt"

    widths: tuple[Count, ...] = (64, 192, 384)
    depths: tuple[Count, ...] = (1, 2, 10)
    heads: tuple[Count, ...] = (1, 3, 6)
    mlp_ratios: tuple[Positive, ...] = (4.0, 4.0, 4.0)
    norm_eps: Positive = 1e-5
    patch_sizes: tuple[Count, ...] = (7, 3, 3)
    patch_strides: tuple[Count, ...] = (4, 2, 2)
    patch_paddings: tuple[Natural, ...] = (2, 1, 1)
    kernels: tuple[Count, ...] = (3, 3, 3)
    kv_strides: tuple[Count, ...] = (2, 2, 2)
    kv_paddings: tuple[Natural, ...] = (1, 1, 1)
    projection: Projection | tuple[Projection, ...] = "dw_bn"
    activation: Literal[tuple(layers.ACTIVATIONS)] = "quick_gelu"
    class_tokens: tuple[bool, ...] = (False, False, True)
    frozen_stats: bool = False

    embeds = ("patch_sizes", "patch_strides", "patch_paddings")
    per_stage = (*RegrownStages.per_stage, *embeds, "kernels", "kv_strides", "kv_paddings", "class_tokens")

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        size, grids = pair(self.img_size), []
        for options in zip(*(getattr(self, name) for name in self.embeds), strict=True):
            size = tuple(unfold.count(s, *options) for s in size)
            grids.append(size)
        return tuple(grids)

    @property
    def prefixes(self) -> tuple[int, ...]:
        return tuple(int(token) for token in self.class_tokens)

    def convolves(self, stage: int) -> bool:
        """Whether the blocks of a stage take keys from a map: all do."""
        return True

    def check(self) -> None:
        super().check()
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise ValueError(f"kernels={self.kernels} must be odd, so that queries keep the map's size")
        keys = zip(self.grids, self.kernels, self.kv_strides, self.kv_paddings, strict=True)
        for (high, wide), *options in keys:
            if min(high, wide) < 1 or unfold.count(min(high, wide), *options) < 1:
                raise ValueError(f"img_size {pair(self.img_size)} is too small: the maps are {self.grids}")

    def embed(self, stage: int) -> Spec:
        kernel, stride, padding = (getattr(self, name)[stage] for name in self.embeds)
        options = {"kernel": kernel, "stride": stride, "padding": padding}
        options |= {"norm_eps": self.norm_eps, "dtype": self.dtype}
        return Spec.of(ConvEmbed, width=self.widths[stage], **options)

    def block(self, stage: int) -> Spec:
        options = {"stride": self.kv_strides[stage], "padding": self.kv_paddings[stage]}
        options |= {"method": of_stage(self.projection, stage), "act": self.activation}
        return Spec.of(CvTBlock, kernel=self.kernels[stage], frozen=self.frozen_stats, **options)

    def path_rate(self, number: int, index: int) -> float:
        """Stochastic depth of a block of a stage, growing over that stage's."""
        rates = self.drop_path
        if not isinstance(rates, tuple):
            rates = (0.0,) * (self.depth - 1) + (rates,)
        return self._grown(rates[number], index, self.depths[number])
