"""LV-ViT: a convolutional stem, and every patch token is classified too."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.backbones.isotropic import Isotropic
from dyntoken.backbones.sizes import check_multiple, pair
from dyntoken.nn import layers
from dyntoken.nn.batchnorm import BatchNorm
from dyntoken.nn.spec import Spec
from dyntoken.nn.trunk import Context
from dyntoken.ops import mixing
from dyntoken.schema import Count, NonNegative, Positive, Size
from dyntoken.types import Tokens

Array = jax.Array


class PatchConv(nn.Module):
    """Three convolutions at half resolution, then one per patch.

    `[B, H, W, Cin]` -> `[B, H / patch, W / patch, width]`: 7x7 stride 2, 3x3, 3x3,
    each with BatchNorm and ReLU, then patch/2 x patch/2 without (`PatchEmbed4_2`).

    Attributes:
      patch: pixels (vertical, horizontal), even.
      channels: of the first three convolutions.
      frozen: see `BatchNorm`.
    """

    patch: tuple[int, int]
    width: int
    channels: int = 64
    frozen: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        x = images
        for number, (kernel, stride) in enumerate(((7, 2), (3, 1), (3, 1)), start=1):
            options = {"use_bias": False, "dtype": self.dtype, "name": f"conv{number}"}
            x = layers.conv(x, self.channels, (kernel, kernel), stride, kernel // 2, **options)
            x = nn.relu(BatchNorm(frozen=self.frozen, dtype=self.dtype, name=f"bn{number}")(x, train))
        half = tuple(p // 2 for p in self.patch)
        return layers.conv(x, self.width, half, half, name="proj", dtype=self.dtype)


class LVViT(Isotropic):
    """LV-ViT (Jiang et al. 2021, "All Tokens Matter"; zihangJiang/TokenLabeling).

    Its auxiliary head classifies every patch token that is left at the end. In
    training `Output.logits` are those of the class token alone, as official;
    `record=("dense",)` gives the auxiliary logits, which the loss `token_label`
    wants. In evaluation `aux_weight` times their maximum over the tokens alive
    is added: kept tokens, hosts that absorbed others, EViT's fused tokens; a
    dropped token has no say, in either form (raoyongming/DynamicViT, `dylvvit`).

    Attributes (besides those of `Isotropic`):
      patch_size: pixels, `n` or `(height, width)`.
      stem: "conv" (`PatchConv`) or "patch" (one product per patch).
      stem_width: channels of the convolutional stem (128 in LV-ViT-L).
      frozen_stats: training leaves the BatchNorm statistics alone and uses them.
      order: per block "tr" (both halves), "mha" or "ffn" (attention or MLP alone; their norm reads
        `skip_lam` times the rows, officially), None for "tr" in all.
      aux_weight: share of the auxiliary head in the evaluation logits (0: it is
        there, but has none); None builds the model without it.
      mix_token: MixToken in training: one box of the token grid for the whole
        batch, swapped between rows 2i and 2i + 1; `Output.mixed` says which
        cells. The losses `ce` and `token_label` mix the targets accordingly;
        distillation refuses it (DynamicViT trains LV-ViT without).
    """

    naming = "lvvit"

    mlp_ratio: Positive = 3.0
    qkv_bias: bool = False
    norm_eps: Positive = 1e-5
    patch_size: Size = 16
    stem: Literal["conv", "patch"] = "conv"
    stem_width: Count = 64
    frozen_stats: bool = False
    order: tuple[Literal["tr", "mha", "ffn"], ...] | None = None
    aux_weight: NonNegative | None = None
    mix_token: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        size, patch = pair(self.img_size), pair(self.patch_size)
        check_multiple(size, patch, f"is not divisible by patch_size {patch}")
        return size[0] // patch[0], size[1] // patch[1]

    def check(self) -> None:
        super().check()
        if self.stem == "conv" and any(p % 2 for p in pair(self.patch_size)):
            raise ValueError(f"stem='conv' halves the patches: patch_size {self.patch_size} must be even")
        if self.order is not None and len(self.order) != self.depth:
            raise ValueError(f"order={self.order} needs one entry per block ({self.depth})")
        if self.mix_token and self.aux_weight is None:
            raise ValueError("mix_token=True needs the auxiliary head: set aux_weight (0.5 is official)")

    def setup_stem(self) -> None:
        """A few convolutions, or one per patch."""
        patch = pair(self.patch_size)
        if self.stem == "conv":
            options = (self.stem_width, self.frozen_stats, self.dtype)
            self.patch_embed = PatchConv(patch, self.width, *options)
        else:
            self.patch_embed = layers.PatchEmbed(patch, self.width, dtype=self.dtype)

    def stem_rows(self, images: Array, context: Context) -> Array:
        more = (context.train,) if self.stem == "conv" else ()
        return self.patch_embed(images, *more).reshape(images.shape[0], -1, self.width)

    def _block(self, index: int) -> Spec:
        spec = super()._block(index)
        if self.order is None or self.order[index] == "tr":
            return spec
        # A norm of a times the rows is the norm with an epsilon of 1 / a^2 times as much.
        half = {"mha": "attention", "ffn": "mlp"}[self.order[index]]
        return spec.with_(half=half, norm_eps=self.norm_eps / self.skip_lam**2)

    def shows(self, at: int) -> frozenset[str]:
        """Nothing where a block has no attention."""
        return frozenset() if self.order is not None and self.order[at] == "ffn" else super().shows(at)

    def embed(self, images: Array, context: Context) -> Tokens:
        """The tokens that enter block 0, in training with some swapped by MixToken."""
        tokens = super().embed(images, context)
        if not (self.mix_token and context.train):
            return tokens
        # One box for the whole global batch: the key is the same on every device. A swapped row
        # has its place's position embedding either way. No block and no dropout uses this number.
        cells = mixing.box(jax.random.fold_in(context.dropout.key, self.depth + 1), self.grid).reshape(-1)
        first, patches = jnp.split(tokens.x, [tokens.prefix], axis=1)
        x = jnp.concatenate([first, mixing.swap(patches, cells)], axis=1)
        return tokens.replace(x=x, mixed=jnp.broadcast_to(cells[None], tokens.carrier.shape))
