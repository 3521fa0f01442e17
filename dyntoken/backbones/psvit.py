"""PS-ViT: tokens are sampled from a feature map at points that the network moves."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.backbones.isotropic import Isotropic
from dyntoken.backbones.sizes import check_multiple, pair
from dyntoken.nn import layers
from dyntoken.nn.batchnorm import BatchNorm
from dyntoken.nn.remat import rematerialised
from dyntoken.nn.spec import Spec
from dyntoken.nn.trunk import Context
from dyntoken.ops import bilinear, sample
from dyntoken.schema import Count, Positive, Size
from dyntoken.types import Tokens

Array = jax.Array
STRIDE = 4  # of the stem


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with BatchNorm, plus the input: `[B, h, w, C]` -> `[B, h, w, width]`."""

    inner: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        skip, y = x, x
        for number, (channels, kernel) in enumerate(
            ((self.inner, 1), (self.inner, 3), (self.width, 1)), start=1
        ):
            y = _conv(y, channels, kernel, 1, self.dtype, f"conv{number}")
            y = BatchNorm(dtype=self.dtype, name=f"bn{number}")(y, train)
            y = nn.relu(y) if number < 3 else y
        if x.shape[-1] != self.width:
            skip = _conv(x, self.width, 1, 1, self.dtype, "downsample_0")
            skip = BatchNorm(dtype=self.dtype, name="downsample_1")(skip, train)
        return nn.relu(y + skip)


class Stem(nn.Module):
    """Image to feature map, `[B, H, W, Cin]` -> `[B, H/4, W/4, width]`.

    Attributes:
      channels: of the first convolution, inside and after the first bottleneck,
        inside the second.
    """

    channels: tuple[int, int, int, int]
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        first, inner, middle, last = self.channels
        x = _conv(images, first, 7, 2, self.dtype, "conv")
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn")(x, train))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        x = Bottleneck(inner, middle, self.dtype, name="bottleneck_0")(x, train)
        return Bottleneck(last, self.width, self.dtype, name="bottleneck_1")(x, train)


def _conv(x: Array, channels: int, kernel: int, stride: int, dtype: Any, name: str) -> Array:
    size, pad = (kernel, kernel), kernel // 2
    return layers.conv(x, channels, size, stride, pad, use_bias=False, dtype=dtype, name=name)


class Sampling(nn.Module):
    """One step of progressive sampling (section 3.2): sample, attend, say where to look next.

    Attributes:
      block: recipe of its transformer block.
      moves: whether it predicts offsets; the last step does not.
      offset_bias: bias of that prediction.
    """

    block: Spec
    moves: bool
    offset_bias: bool = True

    @nn.compact
    def __call__(self, sampled: Array, draws: sample.Draws | None, train: bool) -> tuple[Array, Array | None]:
        """`[B, P, width]` to `(rows [B, P, width], offsets [B, P, 2] float32 or None)`."""
        block = self.block(name="block")
        tokens, _ = block.attend(Tokens.start(sampled, prefix=0), draws, train, False)
        rows = block.feed_forward(tokens, draws).x
        if not self.moves:
            return rows, None
        zeros = nn.initializers.zeros
        move = nn.Dense(2, use_bias=self.offset_bias, kernel_init=zeros, name="offset_layer")
        return rows, move(rows.astype(jnp.float32))


class PSViT(Isotropic):
    """PS-ViT (Yue et al. 2021, "Vision Transformer with Progressive Sampling"; yuexy/PS-ViT).

    A grid of points is laid over the stem's feature map. `iterations` times the
    features at the points are sampled, run through a transformer block and used
    to move the points; then a class token joins, and the trunk begins. Its
    blocks are what `at` counts: block 0 is the first after the sampling.

    The rows of the points are row-major (official code: column-major), so that
    a token's `place` is the cell its point started from; where it ended is
    `points` in the "intermediates" collection, `[B, P, 2]` per iteration.

    Attributes (besides those of `Isotropic`):
      depth: blocks after the sampling (the official `depth` counts both).
      points: (rows, columns) of points, or one number for both.
      iterations: steps of progressive sampling.
      gamma: factor on the offsets where features are sampled; the points
        themselves move by the whole offset, without gradient, as official.
      offset_bias: bias of the layers that predict offsets.
      stem_channels: see `Stem`.
      downsample_ratio: image pixels per unit of the points' coordinates; the stem's map has
        4 per cell, and another ratio reads a part of it only (or beyond it).
      class_token: False leaves the class token out (use pool="mean").
    """

    naming = "psvit"

    mlp_ratio: Positive = 3.0
    qkv_bias: bool = False
    norm_eps: Positive = 1e-5
    points: Size = 14
    iterations: Count = 4
    gamma: float = 1.0
    offset_bias: bool = True
    stem_channels: tuple[Count, Count, Count, Count] = (64, 64, 256, 64)
    class_token: bool = True
    downsample_ratio: Count = STRIDE

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of points."""
        return pair(self.points)

    @property
    def prefix_rows(self) -> dict[str, int]:
        """The class token, if there is one."""
        return {"cls_token": 1} if self.class_token else {}

    def check(self) -> None:
        super().check()
        check_multiple(self.img_size, STRIDE, f"is not divisible by {STRIDE}")

    def positions(self) -> None:
        """None: every row has the embedding of its point."""
        return None

    def setup_stem(self) -> None:
        """Stem, the embedding of points, one module per iteration."""
        self.stem = Stem(tuple(self.stem_channels), self.width, self.dtype)
        self.pos_layer = layers.dense(self.width)
        make = rematerialised(Sampling, self.remat, static=(3,))
        for index in range(self.iterations):
            moves = index < self.iterations - 1
            setattr(self, f"sampling_{index}", make(self._sampling_block(index), moves, self.offset_bias))

    def _sampling_block(self, index: int) -> Spec:
        # Numbers past those of the trunk key the draws; the rate grows from the first iteration on.
        return self._block(0).with_(layer=self.depth + index, drop_path=self.path_rate(index))

    @property
    def path_count(self) -> int:
        """Sampling steps and blocks of the trunk."""
        return self.iterations + self.depth

    def _block(self, index: int) -> Spec:
        return super()._block(index).with_(drop_path=self.path_rate(self.iterations + index))

    def stem_rows(self, images: Array, context: Context) -> Array:
        """`[B, H, W, Cin]` to `[B, P, width]`."""
        features = self.stem(images, context.train)
        size = jnp.asarray(self._extent, jnp.float32)[None, None]
        points = start_points(self.grid, self._extent)
        points = jnp.broadcast_to(points[None], (features.shape[0], *points.shape))
        offset, rows = jnp.zeros_like(points), None
        for index in range(self.iterations):
            sampled = bilinear.sample(features, points + self.gamma * offset)
            points = points + jax.lax.stop_gradient(offset)
            self.sow("intermediates", "points", points)
            sampled = sampled + self.pos_layer(points / size).astype(features.dtype)
            sampled = sampled if rows is None else sampled + rows
            rows, offset = getattr(self, f"sampling_{index}")(sampled, context.dropout, context.train)
        return rows

    def official_points(self) -> np.ndarray:
        """Where the points start, as the official code lists them, column by column: `[1, P, 2]` float32."""
        points = np.asarray(start_points(self.grid, self._extent)).reshape(*self.grid, 2)
        return np.ascontiguousarray(points.transpose(1, 0, 2).reshape(1, -1, 2))

    @property
    def _extent(self) -> tuple[int, int]:
        """(rows, columns) that the points start on and are measured by."""
        return tuple(side // self.downsample_ratio for side in pair(self.img_size))


def start_points(grid: tuple[int, int], size: tuple[int, int]) -> Array:
    """Centres of the cells, `[rows * columns, 2]` (y, x) in pixels of a map of that size, row-major."""
    axes = [(jnp.arange(n, dtype=jnp.float32) + 0.5) * (s / n) for n, s in zip(grid, size, strict=True)]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
