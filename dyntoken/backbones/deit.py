"""ViT and DeiT: patches, class token, one trunk, final norm."""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.nn.block import Block
from dyntoken.nn.trunk import Context, Site, Spec, Trunk
from dyntoken.types import Reduction, Tokens

Array = jax.Array
STEMS = {"patch": layers.PatchEmbed, "conv": layers.ConvStem}


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """`n` or `(rows, columns)` to a pair."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


class ViT(nn.Module):
    """The plain vision transformer of DeiT (facebookresearch/deit, timm).

    Class (and distillation) tokens come first, then one position embedding of
    length prefix + N is added to all rows.

    Attributes:
      img_size, patch_size: pixels, `n` or `(height, width)`.
      in_chans: image channels.
      stem: "patch" (one product per patch) or "conv" (`layers.ConvStem`).
      width, depth, heads, mlp_ratio, qkv_bias, qk_scale: as timm's.
      distilled: a distillation token beside the class token.
      class_token: False leaves the class token out (mean pooling only).
      dropout: after the position embedding, attention projection and MLP.
      drop_path: stochastic depth of the last block.
      drop_path_rule: "linear" from 0 (DeiT) or "constant" (TPS).
      layer_scale: initial LayerScale value, None for none.
      norm_eps: LayerNorm epsilon.
      remat: recompute block halves in the backward pass.
      dtype: compute type; parameters stay float32.
      sites: reduction sites.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    in_chans: int = 3
    stem: str = "patch"
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None
    distilled: bool = False
    class_token: bool = True
    dropout: float = 0.0
    drop_path: float = 0.0
    drop_path_rule: str = "linear"
    layer_scale: float | None = None
    norm_eps: float = 1e-6
    remat: bool = False
    dtype: Any = jnp.float32
    sites: tuple[Site, ...] = ()

    @property
    def default_sites(self) -> tuple[int, ...]:
        """Three sites at the quarters of the depth: (3, 6, 9) of 12 blocks."""
        return tuple(sorted({self.depth * q // 4 for q in (1, 2, 3)}))

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        size, patch = pair(self.img_size), pair(self.patch_size)
        if size[0] % patch[0] or size[1] % patch[1]:
            raise ValueError(
                f"img_size {size} is not divisible by patch_size {patch}; "
                f"the nearest that fits is {tuple(max(p, round(s / p) * p) for s, p in zip(size, patch, strict=True))}"
            )
        return size[0] // patch[0], size[1] // patch[1]

    @property
    def prefix(self) -> int:
        """Rows that are no patches."""
        return int(self.class_token) + int(self.distilled)

    def setup(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        if self.distilled and not self.class_token:
            raise ValueError("a distilled model needs its class token")
        init = layers.trunc_normal()
        rows = self.grid[0] * self.grid[1]
        if self.stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {self.stem!r}")
        self.patch_embed = STEMS[self.stem](pair(self.patch_size), self.width, self.dtype)
        if self.class_token:
            self.cls_token = self.param("cls_token", init, (1, 1, self.width))
        if self.distilled:
            self.dist_token = self.param("dist_token", init, (1, 1, self.width))
        self.pos_embed = self.param("pos_embed", init, (1, self.prefix + rows, self.width))
        self.trunk = Trunk(tuple(self._block(i) for i in range(self.depth)), self.sites, self.remat)
        self.norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)

    def _block(self, index: int) -> Spec:
        if self.drop_path_rule not in ("linear", "constant"):
            raise ValueError(f"drop_path_rule must be linear or constant, got {self.drop_path_rule!r}")
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
            dtype=self.dtype,
        )

    def embed(self, images: Array, context: Context) -> Tokens:
        """Images `[B, H, W, in_chans]` to the tokens that enter block 0."""
        size = pair(self.img_size)
        if images.ndim != 4 or images.shape[1:] != (*size, self.in_chans):
            raise ValueError(
                f"this model takes images [B, {size[0]}, {size[1]}, {self.in_chans}], got {images.shape}; "
                "create_model(..., img_size=, in_chans=) builds it for others"
            )
        x = self.patch_embed(images.astype(self.dtype))
        batch = x.shape[0]
        x = x.reshape(batch, -1, self.width)
        first = [t for t, on in (("cls_token", self.class_token), ("dist_token", self.distilled)) if on]
        prefix = [jnp.broadcast_to(getattr(self, t).astype(x.dtype), (batch, 1, self.width)) for t in first]
        x = jnp.concatenate([*prefix, x], axis=1) + self.pos_embed.astype(x.dtype)
        # Layer number `depth` keys the draw: no block uses it.
        x = layers.drop(x, self.dropout, context.dropout, self.depth)
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
