"""Swin Transformer: attention in windows that shift from block to block; DynamicViT's form of it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.backbones.sizes import check_heads, nearest_multiple, of_stage, pair
from dyntoken.backbones.staged_dual_path import DualPathStages
from dyntoken.nn import layers
from dyntoken.nn.dual_path import Route, Streams, branch
from dyntoken.nn.spec import Spec
from dyntoken.nn.trunk import Context
from dyntoken.ops import attend, sample, select, windows
from dyntoken.schema import Count, Positive, Rate

Array = jax.Array
FAST_EPS = 1e-5  # of the fast path's norm, whatever the blocks have
# Numbers of the random streams inside a layer; the MLP numbers its own two below MLP.
ATTENTION, MLP, ATTENTION_PATH, MLP_PATH, FAST, FAST_PATH = range(6)


class WindowAttention(nn.Module):
    """Self-attention inside the squares of a grid, with a bias per relative position.

    Attributes (besides those of `nn.attention.Attention`):
      grid: (rows, columns) of cells.
      window: side of a square.
      shift: rows and columns that the squares are moved by.
    """

    grid: tuple[int, int]
    window: int
    shift: int
    heads: int
    qkv_bias: bool = True
    qk_scale: float | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32
    attn_dropout: float = 0.0
    head_dim: int | None = None

    @nn.compact
    def __call__(self, x: Array, draws: sample.Draws | None, path: tuple[int, ...]) -> Array:
        """Attends cells `[B, N, C]`."""
        batch, _, width = x.shape
        each = self.head_dim or width // self.heads
        x = windows.partition(x, self.grid, self.window, self.shift)
        squares, rows, _ = x.shape
        qkv = layers.dense(3 * self.heads * each, name="qkv", dtype=self.dtype, use_bias=self.qkv_bias)(x)
        q, k, v = jnp.moveaxis(qkv.reshape(squares, rows, 3, self.heads, each), (2, 3), (0, 2))
        logits = attend.logits(q, k, scale=self.qk_scale if self.qk_scale is not None else each**-0.5)
        logits = logits.reshape(batch, -1, *logits.shape[1:]) + self._bias()[None]
        p = attend.normalise(logits, policy=None, train=False)  # [B, squares of an image, heads, rows, rows]
        p = layers.drop(p, self.attn_dropout, draws, *path, 0).reshape(squares, self.heads, rows, rows)
        y = jnp.einsum("bhqk,bhkd->bhqd", p.astype(v.dtype), v)
        y = jnp.swapaxes(y, 1, 2).reshape(squares, rows, self.heads * each)
        y = layers.dense(width, name="proj", dtype=self.dtype)(y)
        return layers.drop(windows.merge(y, self.grid, self.shift), self.dropout, draws, *path)

    def _bias(self) -> Array:
        """What is added to the logits: `[1 or squares, heads, rows, rows]` float32."""
        shape = ((2 * self.window - 1) ** 2, self.heads)
        table = self.param("relative_position_bias_table", layers.trunc_normal(), shape)
        rows = self.window**2
        bias = select.take(table[None], jnp.asarray(windows.relative_position_index(self.window))[None])
        bias = bias.reshape(1, rows, rows, self.heads).transpose(0, 3, 1, 2)
        if not self.shift:
            return bias
        return bias + jnp.asarray(windows.shift_mask(self.grid, self.window, self.shift))[:, None]


class SwinBlock(nn.Module):
    """`x + attention(norm1(x))`, then `x + mlp(norm2(x))`.

    The fast path is one linear layer after a norm in place of `mlp(norm2(.))`,
    `fastmlp` of raoyongming/DynamicViT; both paths share the attention.

    Attributes (besides those of `nn.block.Block`):
      grid, window, shift: see `WindowAttention`.
      fast: whether it has a fast path.
    """

    layer: int
    width: int
    grid: tuple[int, int]
    window: int
    shift: int
    heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    norm_eps: float = 1e-5
    fast: bool = False
    dtype: Any = jnp.float32
    attn_dropout: float = 0.0
    head_dim: int | None = None

    def setup(self) -> None:
        self.norm1 = layers.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)
        self.attn = WindowAttention(
            self.grid,
            self.window,
            self.shift,
            self.heads,
            self.qkv_bias,
            self.qk_scale,
            self.dropout,
            self.dtype,
            self.attn_dropout,
            self.head_dim,
        )
        self.norm2 = layers.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)
        self.mlp = layers.Mlp(int(self.width * self.mlp_ratio), self.dropout, self.dtype, self.width)
        if self.fast:
            self.fastmlp_0 = layers.LayerNorm(epsilon=FAST_EPS, dtype=self.dtype)
            self.fastmlp_1 = layers.dense(self.width, dtype=self.dtype)

    def __call__(
        self, x: Array | Streams, draws: sample.Draws | None, route: Route | None
    ) -> Array | Streams:
        """Cells `[B, N, C]` in and out; `route` is None ahead of the first site."""

        def slow(y: Array) -> Array:
            return self.mlp(self.norm2(y), draws, (self.layer, MLP))

        def fast(y: Array) -> Array:
            return layers.drop(self.fastmlp_1(self.fastmlp_0(y)), self.dropout, draws, self.layer, FAST)

        if isinstance(x, Streams):
            both = x
            x = self._attended(x.mixed(route.mask), draws)
            both = both.renewed(x, route.mask)
            # Officially the residual of either path is the mixed one.
            return Streams(
                x + layers.drop_path(slow(both.slow), self.drop_path, draws, self.layer, MLP_PATH),
                x + layers.drop_path(fast(both.fast), self.drop_path, draws, self.layer, FAST_PATH),
            )
        x = self._attended(x, draws)
        y = slow(x) if route is None else branch(route, x, slow, fast)
        return x + layers.drop_path(y, self.drop_path, draws, self.layer, MLP_PATH)

    def _attended(self, x: Array, draws: sample.Draws | None) -> Array:
        y = self.attn(self.norm1(x), draws, (self.layer, ATTENTION))
        return x + layers.drop_path(y, self.drop_path, draws, self.layer, ATTENTION_PATH)


class PatchMerging(nn.Module):
    """Norm and a linear layer over each square of four cells: `[B, N, C]` -> `[B, N / 4, width]`.

    Attributes:
      grid: (rows, columns) of cells before it.
    """

    grid: tuple[int, int]
    width: int
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, _, channels = x.shape
        high, wide = (cells // 2 for cells in self.grid)
        # Channels of the four cells in the official order: the row varies first.
        x = x.reshape(batch, high, 2, wide, 2, channels).transpose(0, 1, 3, 4, 2, 5)
        x = x.reshape(batch, high * wide, 4 * channels)
        x = layers.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)
        return layers.dense(self.width, name="reduction", dtype=self.dtype, use_bias=False)(x)


class Swin(DualPathStages):
    """Swin Transformer (Liu et al. 2021; microsoft/Swin-Transformer).

    Odd blocks of a stage move their windows by half a window. Where a grid is no
    larger than the window, one window is the grid, and nothing moves. The
    classifier reads the mean of the normalised cells.

    Attributes (besides those of `DualPathStages`):
      width: channels of the first stage, which double from stage to stage, or one number per stage.
      heads: attention heads per stage.
      window: side of a window, in cells; one number, or one per stage.
      mlp_ratio, head_dim: one number, or one per stage, see `isotropic.Isotropic`.
      qkv_bias, qk_scale, dropout, pos_dropout, attn_dropout, norm_eps: see `isotropic.Isotropic`.
      always_partition: windows keep their side and move also where one window is the grid.
      patch_norm: a norm after the patch embedding.
      position: adds a position embedding to the first stage's cells (officially `ape`).
    """

    naming = "swin"

    width: Count | tuple[Count, ...] = 96
    heads: tuple[Count, ...] = (3, 6, 12, 24)
    window: Count | tuple[Count, ...] = 7
    mlp_ratio: Positive | tuple[Positive, ...] = 4.0
    head_dim: Count | tuple[Count, ...] | None = None
    qkv_bias: bool = True
    qk_scale: Positive | None = None
    dropout: Rate = 0.0
    pos_dropout: Rate | None = None
    always_partition: bool = False
    norm_eps: Positive = 1e-5
    patch_norm: bool = True
    attn_dropout: float = 0.0
    position: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        if isinstance(self.width, tuple):
            return self.width
        return tuple(self.width * 2**stage for stage in range(len(self.depths)))

    @property
    def site_step(self) -> int:
        """Blocks from one default site to the next: 1 of 6 blocks (Swin-T), 2 of 18 (Swin-S, -B)."""
        return 1 if self.depth < 12 else 2

    def check(self) -> None:
        super().check()
        for name in ("heads", "width", "window", "mlp_ratio", "head_dim"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(self.depths):
                raise ValueError(f"{name}={value} needs one entry for each of depths={self.depths}")
        if self.head_dim is None:
            check_heads(self.widths, self.heads)
        window = of_stage(self.window, -1)
        units = tuple(patch * self.total_stride * window for patch in pair(self.patch_size))
        near = nearest_multiple(pair(self.img_size), units)
        for stage in range(len(self.depths)):
            side, grid = self.window_of(stage), self.grid_of(stage)
            if any(cells % side for cells in grid):
                raise ValueError(
                    f"img_size {pair(self.img_size)} gives stage {stage} a grid of {grid}, which windows of "
                    f"{side} x {side} do not tile: choose img_size {near}, or another window"
                )

    def window_of(self, stage: int) -> int:
        """Side of the windows of a stage."""
        window = of_stage(self.window, stage)
        return window if self.always_partition else min(window, *self.grid_of(stage))

    def positions_of(self, path: str) -> tuple[int, tuple[int, int]]:
        """(prefix rows, grid) of the position embedding."""
        return 0, self.grid_of(0)

    def shift_of(self, stage: int, index: int) -> int:
        """Rows and columns by which the windows of a stage's block are moved."""
        window = of_stage(self.window, stage)
        moves = self.always_partition or min(self.grid_of(stage)) > window
        return window // 2 if index % 2 and moves else 0

    def setup(self) -> None:
        self.patch_embed = layers.PatchEmbed(pair(self.patch_size), self.widths[0], dtype=self.dtype)
        if self.patch_norm:
            self.patch_embed_norm = self.make_norm()
        if self.position:
            rows = self.grid_of(0)[0] * self.grid_of(0)[1]
            self.added = self.param("absolute_pos_embed", layers.trunc_normal(), (1, rows, self.widths[0]))
        for number, width in enumerate(self.widths[1:], start=1):
            merging = PatchMerging(self.grid_of(number - 1), width, self.norm_eps, self.dtype)
            setattr(self, f"merge_{number - 1}", merging)  # officially at the end of the stage before
        self.stages = self.make_stages()
        self.norm = self.make_norm()

    def block(self, stage: int, index: int) -> Spec:
        """A block of a stage; those of odd index have shifted windows."""
        return Spec.of(
            SwinBlock,
            window=self.window_of(stage),
            shift=self.shift_of(stage, index),
            heads=self.heads[stage],
            mlp_ratio=of_stage(self.mlp_ratio, stage),
            head_dim=of_stage(self.head_dim, stage),
            qkv_bias=self.qkv_bias,
            qk_scale=self.qk_scale,
            dropout=self.dropout,
            attn_dropout=self.attn_dropout,
        )

    def embed(self, images: Array, context: Context) -> Array:
        """One product per patch, then a norm."""
        x = self.patch_embed(images).reshape(images.shape[0], -1, self.widths[0])
        x = self.patch_embed_norm(x) if self.patch_norm else x
        x = x + self.added.astype(x.dtype) if self.position else x
        # This layer number keys the draw: no block uses it.
        rate = self.dropout if self.pos_dropout is None else self.pos_dropout
        return layers.drop(x, rate, context.dropout, sum(self.depths))

    def downsample(self, stage: int, x: Array) -> Array:
        """Patch merging."""
        return getattr(self, f"merge_{stage - 1}")(x)

    def final_norm(self, x: Array) -> Array:
        """The mean of the normalised cells, and those."""
        x = self.norm(x)
        mean = x.astype(jnp.float32).mean(axis=1, keepdims=True).astype(x.dtype)
        return jnp.concatenate([mean, x], axis=1)
