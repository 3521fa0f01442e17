"""ConvNeXt: a convolutional network built like a transformer; DynamicViT's form of it."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.backbones.sizes import of_stage, pair
from dyntoken.backbones.staged_dual_path import DualPathStages
from dyntoken.nn import layers
from dyntoken.nn.dual_path import Route, Streams, branch
from dyntoken.nn.spec import Spec
from dyntoken.nn.trunk import Context
from dyntoken.ops import sample
from dyntoken.schema import Count, Positive

Array = jax.Array
POOLED = {  # cells [B, N, C] to the classifier's row [B, 1, C]
    "mean": lambda x: x.mean(axis=1, keepdims=True),
    "max": lambda x: x.max(axis=1, keepdims=True),
    "avgmax": lambda x: 0.5 * (x.mean(axis=1, keepdims=True) + x.max(axis=1, keepdims=True)),
}
SLOW_PATH, FAST_PATH = range(2)  # numbers of the random streams inside a layer


class GlobalResponseNorm(nn.Module):
    """`x + scale x n + bias` with n the norm of each channel over all cells, divided by the mean of these norms.

    Woo et al. 2023, "ConvNeXt V2", section 3; both parameters start at 0.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, N, C]` in and out."""
        zeros = nn.initializers.zeros
        scale, bias = (self.param(name, zeros, x.shape[-1:])[None, None] for name in ("scale", "bias"))
        y = x.astype(jnp.float32)
        norm = jnp.sqrt((y * y).sum(axis=1, keepdims=True))
        y = y + scale * y * (norm / (norm.mean(axis=-1, keepdims=True) + 1e-6)) + bias
        return y.astype(self.dtype)


class ConvNeXtBlock(nn.Module):
    """`x + gamma * mlp(norm(depthwise(x)))`.

    The fast path is one linear layer after a norm, `fast_path` of
    raoyongming/DynamicViT; both paths share the convolution.

    Attributes (besides those of `nn.block.Block`):
      grid: (rows, columns) of cells.
      kernel: taps of the convolution, odd.
      layer_scale: initial value of gamma, None for none.
      fast: whether it has a fast path.
      grn: a `GlobalResponseNorm` before the last product.
      conv_bias: bias of the convolution.
    """

    layer: int
    width: int
    grid: tuple[int, int]
    kernel: int = 7
    drop_path: float = 0.0
    layer_scale: float | None = 1e-6
    norm_eps: float = 1e-6
    fast: bool = False
    dtype: Any = jnp.float32
    act: str = "gelu"
    grn: bool = False
    conv_bias: bool = True

    def setup(self) -> None:
        options = {"padding": self.kernel // 2, "kernel_init": layers.trunc_normal(), "dtype": self.dtype}
        self.dwconv = layers.DepthwiseConv(self.kernel, use_bias=self.conv_bias, **options)
        self.response = GlobalResponseNorm(self.dtype, name="grn") if self.grn else lambda x: x
        self.norm = self._norm()
        self.pwconv1 = layers.dense(4 * self.width, dtype=self.dtype)
        self.pwconv2 = layers.dense(self.width, dtype=self.dtype)
        self.gamma = self._gamma("gamma")
        if self.fast:
            self.fast_path_0 = self._norm()
            self.fast_path_1 = layers.dense(self.width, dtype=self.dtype)
            self.fast_path_gamma = self._gamma("fast_path_gamma")

    def _norm(self) -> layers.LayerNorm:
        return layers.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)

    def _gamma(self, name: str) -> Array | None:
        if self.layer_scale is None:
            return None
        return self.param(name, nn.initializers.constant(self.layer_scale), (self.width,))

    def __call__(
        self, x: Array | Streams, draws: sample.Draws | None, route: Route | None
    ) -> Array | Streams:
        """Cells `[B, N, C]` in and out; `route` is None ahead of the first site."""

        def path(y: Array, stream: int) -> Array:
            return layers.drop_path(y, self.drop_path, draws, self.layer, stream)

        if isinstance(x, Streams):
            both = x.renewed(self._mix(x.mixed(route.mask)), route.mask)
            slow = path(self._slow(both.slow), SLOW_PATH)
            return Streams(x.slow + slow, x.fast + path(self._fast(both.fast), FAST_PATH))
        y = self._mix(x)
        y = self._slow(y) if route is None else branch(route, y, self._slow, self._fast)
        return x + path(y, SLOW_PATH)

    def _mix(self, x: Array) -> Array:
        return self.dwconv(x.reshape(x.shape[0], *self.grid, self.width)).reshape(x.shape)

    def _slow(self, x: Array) -> Array:
        x = layers.ACTIVATIONS[self.act](self.pwconv1(self.norm(x)))
        return _scaled(self.pwconv2(self.response(x)), self.gamma)

    def _fast(self, x: Array) -> Array:
        return _scaled(self.fast_path_1(self.fast_path_0(x)), self.fast_path_gamma)


class ConvNeXt(DualPathStages):
    """ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s"; facebookresearch/ConvNeXt).

    The classifier reads the norm of the mean cell.

    Attributes (besides those of `DualPathStages`):
      widths: channels per stage.
      kernel: taps of the depthwise convolutions, odd; one number, or one per stage.
      activation: of the blocks and of stem="overlap_act", see `layers.ACTIVATIONS`.
      grn: a `GlobalResponseNorm` in every block (ConvNeXt V2); not with a method.
      conv_bias: biases of the convolutions.
      stem: "patch" (one convolution per patch), or timm's two 3x3 convolutions of stride 2:
        "overlap", "overlap_act" (an activation between them) or "overlap_tiered" (half as
        many channels between them).
      pooled: what the classifier's row is of the last cells, before the norm: "mean", "max" or "avgmax".
      layer_scale: initial value of gamma, None for none.
      norm_eps: LayerNorm epsilon.
    """

    naming = "convnext"

    depths: tuple[Count, ...] = (3, 3, 9, 3)
    widths: tuple[Count, ...] = (96, 192, 384, 768)
    kernel: Count | tuple[Count, ...] = 7
    layer_scale: float | None = 1e-6
    norm_eps: Positive = 1e-6
    activation: Literal[tuple(layers.ACTIVATIONS)] = "gelu"
    grn: bool = False
    conv_bias: bool = True
    stem: Literal["patch", "overlap", "overlap_act", "overlap_tiered"] = "patch"
    pooled: Literal[tuple(POOLED)] = "mean"

    predictor_eps = 1e-6

    def check(self) -> None:
        super().check()
        if len(self.widths) != len(self.depths):
            raise ValueError(f"widths={self.widths} needs one entry for each of depths={self.depths}")
        kernels = [of_stage(self.kernel, stage) for stage in range(len(self.depths))]
        if any(kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"kernel={self.kernel} must be odd, so that the grid stays")
        if self.activation == "swiglu":
            raise ValueError("activation='swiglu' halves the width of an MLP, and these have none to spare")
        if self.grn and self.sites:
            raise ValueError("grn=True norms over all cells, which a method sends on two paths")
        if self.stem != "patch" and pair(self.patch_size) != (4, 4):
            raise ValueError(f"stem={self.stem!r} has patches of 4 pixels, not {self.patch_size}")

    @property
    def site_step(self) -> int:
        """Blocks from one default site to the next: a ninth of the stage."""
        return max(1, self.depth // 9)

    def setup(self) -> None:
        width = self.widths[0]
        if self.stem == "patch":
            self.stem_conv = self._conv(width, pair(self.patch_size))
        else:
            first = _divisible(width // 2) if self.stem == "overlap_tiered" else width
            self.stem_conv_0 = self._conv(first, (3, 3), (2, 2), 1)
            self.stem_conv_1 = self._conv(width, (3, 3), (2, 2), 1)
        self.stem_norm = self.make_norm()
        for number, width in enumerate(self.widths[1:], start=1):
            setattr(self, f"downsample_{number}_norm", self.make_norm())
            setattr(self, f"downsample_{number}_conv", self._conv(width, (2, 2)))
        self.stages = self.make_stages()
        self.norm = self.make_norm()

    def _conv(
        self, width: int, side: tuple[int, int], stride: tuple[int, int] | None = None, padding: int = 0
    ) -> nn.Conv:
        init = layers.trunc_normal()
        options = {"use_bias": self.conv_bias, "kernel_init": init, "dtype": self.dtype}
        return nn.Conv(width, side, stride or side, padding, **options)

    def block(self, stage: int, index: int) -> Spec:
        options = {"act": self.activation, "grn": self.grn, "conv_bias": self.conv_bias}
        kernel = of_stage(self.kernel, stage)
        return Spec.of(ConvNeXtBlock, kernel=kernel, layer_scale=self.layer_scale, **options)

    def embed(self, images: Array, context: Context) -> Array:
        """One convolution per patch, or two small ones, then a norm."""
        if self.stem == "patch":
            x = self.stem_conv(images)
        else:
            x = self.stem_conv_0(images)
            x = layers.ACTIVATIONS[self.activation](x) if self.stem == "overlap_act" else x
            x = self.stem_conv_1(x)
        return self.stem_norm(x).reshape(images.shape[0], -1, self.widths[0])

    def downsample(self, stage: int, x: Array) -> Array:
        """Norm, then one convolution per square of four cells."""
        x = getattr(self, f"downsample_{stage}_norm")(x)
        x = x.reshape(x.shape[0], *self.grid_of(stage - 1), self.widths[stage - 1])
        return getattr(self, f"downsample_{stage}_conv")(x).reshape(x.shape[0], -1, self.widths[stage])

    def final_norm(self, x: Array) -> Array:
        """The pooled cell and every cell, normalised."""
        pooled = POOLED[self.pooled](x.astype(jnp.float32))
        return self.norm(jnp.concatenate([pooled.astype(x.dtype), x], axis=1))


def _divisible(width: int) -> int:
    """timm's `make_divisible`: the nearest multiple of 8, at most a tenth less."""
    near = max(8, (width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * width else near


def _scaled(x: Array, gamma: Array | None) -> Array:
    return x if gamma is None else x * gamma.astype(x.dtype)[None, None]
