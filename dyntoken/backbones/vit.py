"""ViT, DeiT and their kin (DINOv2, SigLIP, DINOv3, EVA-02): patches, class token, one trunk, final norm."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from dyntoken.backbones.isotropic import Isotropic
from dyntoken.backbones.sizes import check_multiple, pair
from dyntoken.nn import layers
from dyntoken.nn.trunk import Context
from dyntoken.ops import resample, sample, select
from dyntoken.ops.rope import COORDINATES, LAYOUTS, Rope
from dyntoken.schema import Natural, Positive, Rate, Size
from dyntoken.types import Tokens

Array = jax.Array
STEMS = {"patch": layers.PatchEmbed, "conv": layers.ConvStem}


class ViT(Isotropic):
    """The plain vision transformer of DeiT (facebookresearch/deit, timm).

    Attributes (besides those of `Isotropic`):
      patch_size: pixels, `n` or `(height, width)`.
      tokens: wanted (rows, columns) of patches in place of `patch_size`: kernel
        and stride are ceil(size / tokens), with zeros around the image, which
        gives DVT's three stems (blackfeather-wang/Dynamic-Vision-Transformer).
      stem: "patch" (one product per patch) or "conv" (`layers.ConvStem`, whose
        patches are powers of 2: with `tokens`, the next one).
      distilled: a distillation token beside the class token.
      class_token: False leaves the class token out (mean pooling only).
      registers: rows after the class token that are no patches and that no head reads.
      pre_norm: a norm before the first block, and no bias in the patch product (CLIP).
      position: False adds no position embedding.
      embed_class: False gives the position embedding no rows for the prefix (timm's `no_embed_class`).
      resize: how weights of another grid get their position embedding resized by default, see
        `load_weights`: "bicubic" (the official DeiT) or "timm".
      rest: what becomes of pixels at the bottom and on the right that fill no patch: "refuse",
        "pad" (zeros up to whole patches, timm's `dynamic_img_pad`) or "drop" (transformers).
      naming: whose key names exported weights bear: those of timm's `VisionTransformer` ("vit"),
        of its `Eva` ("eva"), or of its `Eva` with `qkv_fused=False` ("eva_unfused").
      rope: a rotary position embedding, over patch centres ("centred", DINOv3) or patch numbers
        ("index", EVA-02), see `ops.rope`.
      rope_layout, rope_base: which channels turn together, and how far periods range.
      rope_grid: (rows, columns) of patches in pretraining, to which rope="index" scales its numbers.
      patch_drop: share of the patches that training leaves out, drawn anew for every image
        (Li et al. 2023, "Scaling Language-Image Pre-training via Masking"); not with a method.
    """

    patch_size: Size = 16
    tokens: Size | None = None
    stem: Literal["patch", "conv"] = "patch"
    distilled: bool = False
    class_token: bool = True
    registers: Natural = 0
    pre_norm: bool = False
    position: bool = True
    embed_class: bool = True
    resize: Literal[resample.METHODS] = "bicubic"
    rest: Literal["refuse", "pad", "drop"] = "refuse"
    naming: Literal["vit", "eva", "eva_unfused"] = "vit"
    rope: Literal[tuple(COORDINATES)] | None = None
    rope_layout: Literal[LAYOUTS] = "halves"
    rope_base: Positive = 100.0
    rope_grid: Size | None = None
    patch_drop: Rate = 0.0

    @property
    def patches(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(kernel, padding) of the stem, each (vertical, horizontal)."""
        size = pair(self.img_size)
        if self.tokens is None:
            patch = pair(self.patch_size)
            if self.rest == "refuse":
                check_multiple(size, patch, f"is not divisible by patch_size {patch}")
            elif self.rest == "drop" and any(s < p for s, p in zip(size, patch, strict=True)):
                raise ValueError(f"img_size {size} is smaller than a patch of {patch}")
            return patch, (0, 0)
        tokens = pair(self.tokens)
        if min(tokens) < 1 or any(n > s for n, s in zip(tokens, size, strict=True)):
            raise ValueError(f"an image of {size} pixels does not give {tokens} patches")
        kernel = tuple(-(-s // n) for s, n in zip(size, tokens, strict=True))
        if self.stem == "conv":
            kernel = tuple(max(2, 1 << (k - 1).bit_length()) for k in kernel)
        padding = tuple(-(-(k * n - s) // 2) for k, n, s in zip(kernel, tokens, size, strict=True))
        return kernel, padding

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        if self.tokens:
            return pair(self.tokens)
        kernel, _ = self.patches
        more = [patch - 1 if self.rest == "pad" else 0 for patch in kernel]
        return tuple((s + m) // p for s, m, p in zip(pair(self.img_size), more, kernel, strict=True))

    @property
    def prefix_rows(self) -> dict[str, int]:
        """Class token, then distillation token, then registers."""
        rows = {
            "cls_token": int(self.class_token),
            "dist_token": int(self.distilled),
            "reg_token": self.registers,
        }
        return {name: count for name, count in rows.items() if count}

    def rotary(self) -> Rope | None:
        """The rotary position embedding of its blocks, None for none."""
        if self.rope is None:
            return None
        reference = None if self.rope_grid is None else pair(self.rope_grid)
        size = self.head_dim or self.width // self.heads
        return Rope(size, self.rope, self.rope_layout, self.rope_base, reference)

    def check(self) -> None:
        super().check()
        self.rotary()
        if self.distilled and not self.class_token:
            raise ValueError("a distilled model needs its class token")
        if self.patch_drop and self.sites:
            raise ValueError(
                "patch_drop drops patches ahead of the sites, whose counts are fixed: give one of both"
            )
        if self.rest != "refuse" and self.tokens is not None:
            raise ValueError(f"tokens={self.tokens} pads the image by itself: leave rest={self.rest!r} out")
        if self.pre_norm and self.stem != "patch":
            raise ValueError("pre_norm needs stem='patch'")
        kernel, _ = self.patches
        if self.stem == "conv" and (kernel[0] != kernel[1] or kernel[0].bit_count() > 1 or kernel[0] < 2):
            raise ValueError(f"stem='conv' needs square patches of 2, 4, 8, ... pixels, not {kernel}")

    def setup_stem(self) -> None:
        """One convolution without overlap, or a few small ones."""
        kernel, padding = self.patches
        options = {"use_bias": False} if self.pre_norm else {}
        self.patch_embed = STEMS[self.stem](kernel, self.width, padding, self.dtype, **options)
        if self.pre_norm:
            self.norm_pre = self.make_norm()

    @property
    def position_prefix(self) -> int:
        """Rows of the position embedding that are the prefix's."""
        return self.prefix if self.embed_class else 0

    def positions(self) -> Array | None:
        """The position embedding `[1, prefix + N, width]` (without `embed_class` `[1, N, width]`), or None."""
        return super().positions() if self.position else None

    def embed(self, images: Array, context: Context) -> Tokens:
        """Images `[B, H, W, in_chans]` to the tokens that enter block 0."""
        tokens = super().embed(images, context)
        if self.patch_drop and context.train:
            tokens = self._thinned(tokens, context.dropout)
        return tokens.replace(x=self.norm_pre(tokens.x)) if self.pre_norm else tokens

    def _thinned(self, tokens: Tokens, draws: sample.Draws) -> Tokens:
        """A random part of the patches, in their order."""
        # No block and no other dropout uses this number.
        shuffled = sample.permutation(tokens.size, draws, self.depth + 1)
        keep = jnp.sort(shuffled[:, : max(1, int(tokens.count * (1 - self.patch_drop)))], axis=1)
        patches = select.take(tokens.patches, keep)
        return tokens.replace(
            x=jnp.concatenate([tokens.x[:, : tokens.prefix], patches], axis=1),
            place=keep,
            carrier=select.inverse(keep, tokens.count),
            size=tokens.size[:, : keep.shape[1]],
        )

    def shows(self, at: int) -> frozenset[str]:
        """Fields of `Attended`: registers alone are rows before the patches, but no class token."""
        return super().shows(at) - ({"cls"} if not self.class_token else set())

    def stem_rows(self, images: Array, context: Context) -> Array:
        if self.rest == "pad":
            more = [-side % patch for side, patch in zip(images.shape[1:3], self.patches[0], strict=True)]
            images = jnp.pad(images, ((0, 0), (0, more[0]), (0, more[1]), (0, 0)))
        return self.patch_embed(images).reshape(images.shape[0], -1, self.width)
