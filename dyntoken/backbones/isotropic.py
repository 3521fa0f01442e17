"""What all isotropic backbones share: class token, positions, one trunk, final norm."""

from __future__ import annotations

from typing import Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.nn.block import Block
from dyntoken.nn.reduction_sites import ReductionSites
from dyntoken.nn.remat import Remat, check_policy
from dyntoken.nn.trunk import Context, Site, Spec, Trunk
from dyntoken.schema import Count, Positive, Rate, Size
from dyntoken.types import DType, Reduction, Tokens

Array = jax.Array


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """`n` or `(rows, columns)` to a pair."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def check_images(images: Array, img_size: int | tuple[int, int], in_chans: int) -> None:
    """Raises ValueError unless `images` are `[B, *img_size, in_chans]`."""
    size = pair(img_size)
    if images.ndim != 4 or images.shape[1:] != (*size, in_chans):
        raise ValueError(
            f"this model takes images [B, {size[0]}, {size[1]}, {in_chans}], got {images.shape}; "
            "create_model(..., img_size=, in_chans=) builds it for others"
        )


class Isotropic(ReductionSites, nn.Module):
    """A stem, then blocks of one width.

    Class (and other prefix) tokens come first, then one position embedding of
    length prefix + N is added to all rows. A subclass gives the stem
    (`setup_stem`, `stem_rows`), the `grid`, its prefix tokens and its positions.

    Attributes:
      img_size: pixels, `n` or `(height, width)`.
      in_chans: image channels.
      width, depth, heads, mlp_ratio, qkv_bias, qk_scale: as timm's.
      dropout: after the position embedding, attention projection and MLP.
      attn_dropout: on the attention weights.
      pos_dropout: after the position embedding, in place of `dropout`.
      proj_bias: biases of attention projection and MLP.
      qk_norm: a LayerNorm per head on queries and keys.
      activation: of the MLPs: "gelu" (erf), "gelu_tanh", "quick_gelu", "relu", "silu" or "swiglu".
      final_norm: False hands on the last block's tokens as they are.
      drop_path: stochastic depth of the last block.
      drop_path_rule: "linear" from 0 (DeiT) or "constant" (TPS).
      layer_scale: initial LayerScale value, None for none.
      norm_eps: LayerNorm epsilon.
      skip_lam: what the residual branches are divided by.
      context: channels that something outside concatenates before each MLP,
        one number or one per block.
      remat: recompute block halves in the backward pass: True, or the name of
        what to keep, see `nn.remat.POLICIES`.
      scan: run the blocks between two sites as one loop: same parameters and
        results, a shorter compilation, see `nn.scan`.
      dtype: compute type; parameters stay float32.
      sites: reduction sites.
    """

    img_size: Size = 224
    in_chans: Count = 3
    width: Count = 384
    depth: Count = 12
    heads: Count = 6
    mlp_ratio: Positive = 4.0
    qkv_bias: bool = True
    qk_scale: Positive | None = None
    dropout: Rate = 0.0
    attn_dropout: Rate = 0.0
    pos_dropout: Rate | None = None
    proj_bias: bool = True
    qk_norm: bool = False
    activation: Literal[tuple(layers.ACTIVATIONS)] = "gelu"
    final_norm: bool = True
    drop_path: Rate = 0.0
    drop_path_rule: Literal["linear", "constant"] = "linear"
    layer_scale: float | None = None
    norm_eps: Positive = 1e-6
    skip_lam: Positive = 1.0
    context: int | tuple[int, ...] = 0
    remat: Remat = False
    scan: bool = False
    dtype: DType = jnp.float32
    sites: tuple[Site, ...] = ()

    @property
    def default_sites(self) -> tuple[int, ...]:
        """Three sites at the quarters of the depth: (3, 6, 9) of 12 blocks."""
        return tuple(sorted({self.depth * q // 4 for q in (1, 2, 3)}))

    @property
    def prefix_rows(self) -> dict[str, int]:
        """Parameters of the rows that are no patches, in order, and how many rows each has."""
        return {"cls_token": 1}

    @property
    def prefix(self) -> int:
        """Rows that are no patches."""
        return sum(self.prefix_rows.values())

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        raise NotImplementedError(f"{type(self).__name__} does not say its grid")

    def check(self) -> None:
        """Raises ValueError for fields that do not fit together."""
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        check_policy(self.remat)

    def setup_stem(self) -> None:
        """Builds the modules of the stem."""
        raise NotImplementedError(f"{type(self).__name__} does not build a stem")

    def stem_rows(self, images: Array, context: Context) -> Array:
        """Images to patch rows `[B, N, width]`."""
        raise NotImplementedError(f"{type(self).__name__} does not run a stem")

    def positions(self) -> Array | None:
        """The position embedding `[1, prefix + N, width]`; called once, in `setup`.

        None: the stem's rows know where they are; nothing is added to them.
        """
        rows = self.prefix + self.grid[0] * self.grid[1]
        return self.param("pos_embed", layers.trunc_normal(), (1, rows, self.width))

    def setup(self) -> None:
        self.check()
        self.setup_stem()
        init = layers.trunc_normal()
        self.first = [self.param(name, init, (1, n, self.width)) for name, n in self.prefix_rows.items()]
        self.added = self.positions()
        blocks = tuple(self._block(i) for i in range(self.depth))
        self.trunk = Trunk(blocks, self.sites, self.remat, self.scan)
        self.norm = self.make_norm() if self.final_norm else lambda x: x

    def make_norm(self) -> nn.LayerNorm:
        """A LayerNorm of the backbone's own epsilon and type."""
        return nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)

    def _block(self, index: int) -> Spec:
        linear = self.drop_path * index / max(1, self.depth - 1)
        return Spec.of(
            Block,
            layer=index,
            width=self.width,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            qk_scale=self.qk_scale,
            dropout=self.dropout,
            drop_path=linear if self.drop_path_rule == "linear" else self.drop_path,
            layer_scale=self.layer_scale,
            norm_eps=self.norm_eps,
            skip_lam=self.skip_lam,
            context=self.context if isinstance(self.context, int) else self.context[index],
            dtype=self.dtype,
            attn_dropout=self.attn_dropout,
            proj_bias=self.proj_bias,
            qk_norm=self.qk_norm,
            act=self.activation,
        )

    def embed(self, images: Array, context: Context) -> Tokens:
        """Images `[B, H, W, in_chans]` to the tokens that enter block 0."""
        check_images(images, self.img_size, self.in_chans)
        x = self.stem_rows(images.astype(self.dtype), context)
        batch = x.shape[0]
        first = [jnp.broadcast_to(t.astype(x.dtype), (batch, *t.shape[1:])) for t in self.first]
        x = jnp.concatenate([*first, x], axis=1)
        if self.added is not None:
            # Layer number `depth` keys the draw: no block uses it.
            rate = self.dropout if self.pos_dropout is None else self.pos_dropout
            x = layers.drop(x + self.added.astype(x.dtype), rate, context.dropout, self.depth)
        return Tokens.start(x, prefix=self.prefix, grid=self.grid)

    def __call__(
        self, images: Array, context: Context
    ) -> tuple[Tokens, tuple[Reduction, ...], dict[str, Any]]:
        """Runs stem, trunk and final norm.

        Returns:
          Normalised tokens, one `Reduction` per site, records by name.
        """
        tokens = self.embed(images, context)
        chex.assert_shape(tokens.x, (images.shape[0], self.prefix + tokens.initial, self.width))
        embed = {"embed": tokens.x} if "embed" in context.record else {}
        tokens, reductions, records = self.trunk(tokens, context)
        return tokens.replace(x=self.norm(tokens.x)), reductions, {**embed, **records}
