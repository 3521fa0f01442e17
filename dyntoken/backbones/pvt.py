"""PVT: a pyramid of patches whose keys come from a smaller map."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.backbones.sizes import check_multiple, pair
from dyntoken.backbones.staged_regrown import RegrownStages
from dyntoken.nn import layers
from dyntoken.nn.spatial import SpatialBlock, SpatialMap
from dyntoken.nn.spec import Spec
from dyntoken.ops import attend, sample
from dyntoken.schema import Count, Positive
from dyntoken.types import Attended

Array = jax.Array
EMBED_EPS = 1e-5  # torch's default, which its embeddings and reduced maps keep whatever the blocks have


class Embed(nn.Module):
    """Non-overlapping patches, then a norm: `[B, H, W, Cin]` -> `[B, H // patch, W // patch, width]`."""

    patch: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = layers.conv(x, self.width, (self.patch,) * 2, self.patch, name="proj", dtype=self.dtype)
        return layers.LayerNorm(epsilon=EMBED_EPS, dtype=self.dtype, name="norm")(x)


class SpatialReductionAttention(nn.Module):
    """Queries of all rows, keys and values of a map that one convolution made smaller.

    Attributes (besides those of `nn.attention.Attention`):
      ratio: kernel and stride of that convolution; with 1 the rows themselves are keys.
    """

    heads: int
    qkv_bias: bool = True
    qk_scale: float | None = None
    ratio: int = 1
    dropout: float = 0.0
    dtype: Any = jnp.float32
    attn_dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        spatial_map: SpatialMap | None = None,
        policy: Array | None = None,
        prefix: int = 0,
        train: bool = False,
        return_scores: bool = False,
        size: Array | None = None,
        draws: sample.Draws | None = None,
        path: tuple[int, ...] = (),
    ) -> tuple[Array, Attended | None]:
        """Attends `x [B, T, C]`.

        Args (the others, and the result, are those of `Attention`):
          spatial_map: the patches as a map, if ratio > 1; `policy` and `size` only if it is 1.
        """
        batch, rows, width = x.shape
        options = {"dtype": self.dtype, "use_bias": self.qkv_bias}
        source = x
        if self.ratio > 1:
            kernel = (self.ratio, self.ratio)
            small = layers.conv(spatial_map.cells, width, kernel, self.ratio, name="sr", dtype=self.dtype)
            source = small.reshape(batch, -1, width)
            source = layers.LayerNorm(epsilon=EMBED_EPS, dtype=self.dtype, name="norm")(source)
        q = layers.dense(width, name="q", **options)(x)
        q = jnp.swapaxes(q.reshape(batch, rows, self.heads, -1), 1, 2)  # [B, heads, T, head_dim]
        kv = layers.dense(2 * width, name="kv", **options)(source)
        kv = kv.reshape(batch, source.shape[1], 2, self.heads, -1)
        k, v = jnp.moveaxis(kv, (2, 3), (0, 2))  # each [B, heads, keys, head_dim]
        scale = self.qk_scale if self.qk_scale is not None else (width // self.heads) ** -0.5
        seen = None
        if policy is None and not return_scores and (draws is None or self.attn_dropout == 0.0):
            y = attend.attention(q, k, v, scale=scale, size=size)
        else:
            weight = None if size is None else attend.log_size(size)
            p = attend.normalise(attend.logits(q, k, scale=scale, bias=weight), policy=policy, train=train)
            p = layers.drop(p, self.attn_dropout, draws, *path, 0)
            y = jnp.einsum("bhqk,bhkd->bhqd", p.astype(v.dtype), v)
            cls = attend.class_attention(p, prefix) if prefix else None
            seen = Attended(cls=cls, keys=k if self.ratio == 1 else None)
        y = jnp.swapaxes(y, 1, 2).reshape(batch, rows, width)
        y = layers.dense(width, name="proj", dtype=self.dtype)(y)
        return layers.drop(y, self.dropout, draws, *path), seen if return_scores else None


class PVTBlock(SpatialBlock):
    """`SpatialBlock` with spatial reduction by `ratio`."""

    ratio: int = 1

    @property
    def convolves(self) -> bool:
        return self.ratio > 1

    def attention(self) -> nn.Module:
        options = (self.heads, self.qkv_bias, self.qk_scale, self.ratio, self.dropout, self.dtype)
        return SpatialReductionAttention(*options, self.attn_dropout)


class PVT(RegrownStages):
    """PVT v1 (Wang et al. 2021, "Pyramid Vision Transformer"; whai362/PVT).

    The class token joins in the last stage, whose keys are its own rows. Of
    tokens reduced there dropped ones are no keys; in the other stages keys come
    from the reduced map, dropped cells included. What a map costs does not
    shrink: the convolutions that make keys, and the next stage's embedding.

    Attributes (besides those of `RegrownStages`):
      patch_size: pixels of a patch of the first stage; later ones halve the map.
      sr_ratios: per stage, how much smaller the map of keys is along each axis;
        1 in the last stage.
      qk_scale: factor on the logits; None is head_dim ** -0.5.
    """

    naming = "pvt"

    patch_size: Count = 4
    sr_ratios: tuple[Count, ...] = (8, 4, 2, 1)
    qk_scale: Positive | None = None

    per_stage = (*RegrownStages.per_stage, "sr_ratios")
    positions = True
    resize = "bilinear"

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        size, whole = pair(self.img_size), self.patch_size * 2 ** (self.depth - 1)
        halved = f"(patch_size {self.patch_size}, halved {self.depth - 1} times)"
        check_multiple(size, whole, f"is not divisible by {whole} {halved}")
        first = tuple(s // self.patch_size for s in size)
        return tuple((first[0] >> stage, first[1] >> stage) for stage in range(self.depth))

    @property
    def prefixes(self) -> tuple[int, ...]:
        return (0,) * (self.depth - 1) + (1,)

    def convolves(self, stage: int) -> bool:
        return self.sr_ratios[stage] > 1

    def shows(self, at: int) -> frozenset[str]:
        """Also the keys where no convolution makes them."""
        return super().shows(at) | ({"keys"} if self.sr_ratios[at] == 1 else set())

    def check(self) -> None:
        super().check()
        if self.sr_ratios[-1] != 1:
            raise ValueError(
                f"sr_ratios={self.sr_ratios}: the last stage has a class token, which no map holds: 1 there"
            )
        for stage, (ratio, grid) in enumerate(zip(self.sr_ratios, self.grids, strict=True)):
            if not 1 <= ratio <= min(grid):
                raise ValueError(f"sr_ratios={self.sr_ratios}: stage {stage} has a map of {grid}")

    def embed(self, stage: int) -> Spec:
        patch = self.patch_size if stage == 0 else 2
        return Spec.of(Embed, patch=patch, width=self.widths[stage], dtype=self.dtype)

    def block(self, stage: int) -> Spec:
        return Spec.of(PVTBlock, ratio=self.sr_ratios[stage], qk_scale=self.qk_scale)
