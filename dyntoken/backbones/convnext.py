"""ConvNeXt: a convolutional network built like a transformer; DynamicViT's form of it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.backbones.sizes import pair
from dyntoken.backbones.staged_dual_path import DualPathStages
from dyntoken.nn import layers
from dyntoken.nn.dual_path import Route, Streams, branch
from dyntoken.nn.spec import Spec
from dyntoken.nn.trunk import Context
from dyntoken.ops import sample
from dyntoken.schema import Count, Positive

Array = jax.Array
SLOW_PATH, FAST_PATH = range(2)  # numbers of the random streams inside a layer


class ConvNeXtBlock(nn.Module):
    """`x + gamma * mlp(norm(depthwise(x)))`.

    The fast path is one linear layer after a norm, `fast_path` of
    raoyongming/DynamicViT; both paths share the convolution.

    Attributes (besides those of `nn.block.Block`):
      grid: (rows, columns) of cells.
      kernel: taps of the convolution, odd.
      layer_scale: initial value of gamma, None for none.
      fast: whether it has a fast path.
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

    def setup(self) -> None:
        options = {"padding": self.kernel // 2, "kernel_init": layers.trunc_normal(), "dtype": self.dtype}
        self.dwconv = layers.DepthwiseConv(self.kernel, **options)
        self.norm = self._norm()
        self.pwconv1 = layers.dense(4 * self.width, dtype=self.dtype)
        self.pwconv2 = layers.dense(self.width, dtype=self.dtype)
        self.gamma = self._gamma("gamma")
        if self.fast:
            self.fast_path_0 = self._norm()
            self.fast_path_1 = layers.dense(self.width, dtype=self.dtype)
            self.fast_path_gamma = self._gamma("fast_path_gamma")

    def _norm(self) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)

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
        return self.dwconv(x.reshape(len(x), *self.grid, self.width)).reshape(x.shape)

    def _slow(self, x: Array) -> Array:
        return _scaled(self.pwconv2(layers.gelu(self.pwconv1(self.norm(x)))), self.gamma)

    def _fast(self, x: Array) -> Array:
        return _scaled(self.fast_path_1(self.fast_path_0(x)), self.fast_path_gamma)


class ConvNeXt(DualPathStages):
    """ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s"; facebookresearch/ConvNeXt).

    The classifier reads the norm of the mean cell.

    Attributes (besides those of `DualPathStages`):
      widths: channels per stage.
      kernel: taps of the depthwise convolutions, odd.
      layer_scale: initial value of gamma, None for none.
      norm_eps: LayerNorm epsilon.
    """

    depths: tuple[Count, ...] = (3, 3, 9, 3)
    widths: tuple[Count, ...] = (96, 192, 384, 768)
    kernel: Count = 7
    layer_scale: float | None = 1e-6
    norm_eps: Positive = 1e-6

    predictor_eps = 1e-6

    def check(self) -> None:
        super().check()
        if len(self.widths) != len(self.depths):
            raise ValueError(f"widths={self.widths} needs one entry for each of depths={self.depths}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd, so that the grid stays")

    @property
    def site_step(self) -> int:
        """Blocks from one default site to the next: a ninth of the stage."""
        return max(1, self.depth // 9)

    def setup(self) -> None:
        self.stem_conv = self._conv(self.widths[0], pair(self.patch_size))
        self.stem_norm = self.make_norm()
        for number, width in enumerate(self.widths[1:], start=1):
            setattr(self, f"downsample_{number}_norm", self.make_norm())
            setattr(self, f"downsample_{number}_conv", self._conv(width, (2, 2)))
        self.stages = self.make_stages()
        self.norm = self.make_norm()

    def _conv(self, width: int, side: tuple[int, int]) -> nn.Conv:
        init = layers.trunc_normal()
        return nn.Conv(width, side, side, "VALID", kernel_init=init, dtype=self.dtype)

    def block(self, stage: int, index: int) -> Spec:
        return Spec.of(ConvNeXtBlock, kernel=self.kernel, layer_scale=self.layer_scale)

    def embed(self, images: Array, context: Context) -> Array:
        """One convolution per patch, then a norm."""
        return self.stem_norm(self.stem_conv(images)).reshape(len(images), -1, self.widths[0])

    def downsample(self, stage: int, x: Array) -> Array:
        """Norm, then one convolution per square of four cells."""
        x = getattr(self, f"downsample_{stage}_norm")(x)
        x = x.reshape(len(x), *self.grid_of(stage - 1), self.widths[stage - 1])
        return getattr(self, f"downsample_{stage}_conv")(x).reshape(len(x), -1, self.widths[stage])

    def final_norm(self, x: Array) -> Array:
        """The mean cell and every cell, normalised."""
        mean = x.astype(jnp.float32).mean(axis=1, keepdims=True).astype(x.dtype)
        return self.norm(jnp.concatenate([mean, x], axis=1))


def _scaled(x: Array, gamma: Array | None) -> Array:
    return x if gamma is None else x * gamma.astype(x.dtype)[None, None]
