"""Small linen layers with the official initialisation and sub-module names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.ops import backend, backward, norm, sample
from dyntoken.ops.depthwise import depthwise

Array = jax.Array
Dtype = Any


def trunc_normal(stddev: float = 0.02):
    """timm's `trunc_normal_`: a normal cut off at the absolute values -2 and 2."""

    def init(key, shape, dtype=jnp.float32):
        bound = 2.0 / stddev
        return stddev * jax.random.truncated_normal(key, -bound, bound, shape, dtype)

    return init


def torch_uniform(fan_in: int):
    """torch's default for convolutions and their biases: U(+-1/sqrt(fan_in))."""

    def init(key, shape, dtype=jnp.float32):
        bound = 1.0 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(
    features: int, *, name: str | None = None, dtype: Dtype = jnp.float32, use_bias: bool = True
) -> nn.Dense:
    """A linear layer as DeiT initialises it: truncated normal 0.02, bias zero."""
    options = {"dtype": dtype, "name": name, "dot_general": _rows_dot}
    return nn.Dense(features, use_bias=use_bias, kernel_init=trunc_normal(), **options)


def _rows_dot(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`lax.dot_general`; on a CPU of all rows as one matrix, or XLA would transpose the gradient for the kernel's."""
    if backend.platform() != "cpu" or not all(isinstance(side, int) for side in x.shape):
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options).reshape(*x.shape[:-1], -1)


def conv(
    x: Array,
    features: int,
    kernel: tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | Sequence[tuple[int, int]] = 0,
    *,
    name: str,
    dtype: Dtype = jnp.float32,
    use_bias: bool = True,
) -> Array:
    """A convolution of maps `[B, H, W, C]` with torch's default initialisation; a child of the calling module."""
    init = torch_uniform(kernel[0] * kernel[1] * x.shape[-1])
    options = {"kernel_init": init, "bias_init": init, "dtype": dtype, "use_bias": use_bias, "name": name}
    return nn.Conv(features, kernel, stride, padding, **options)(x)


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """Exact (erf) GELU; the tanh form moves logits by 3e-4.

    Written with erf as torch writes it: `jax.nn.gelu` takes erfc, which made a
    whole MLP three times slower on a CPU. Training keeps its derivative alone, one array where the chain
    rule would keep four.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (moved,) = primals, tangents
    below = 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))  # the share of a normal below x
    slope = below + x * jnp.exp(-0.5 * jnp.square(x)) * (1.0 / math.sqrt(2.0 * math.pi))
    y = x * below
    return backward.after(y, slope) if backend.platform() == "cpu" else y, moved * slope


class LayerNorm(nn.Module):
    """`flax.linen.LayerNorm` over the last axis, with the same parameters and results; see `ops.norm`.

    Attributes:
      epsilon: added to the variance.
      dtype: of the result.
    """

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return norm.layer_norm(x, scale, bias, eps=self.epsilon, dtype=self.dtype)


# Activations of an MLP by timm's names; "swiglu" (SwiGLUPacked) halves its width.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "hard_mish": lambda x: 0.5 * x * jnp.clip(x + 2.0, 0.0, 2.0),
    "elu": jax.nn.elu,
    "celu": jax.nn.celu,
    "selu": jax.nn.selu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "identity": lambda x: x,
    "swiglu": lambda x: jax.nn.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :],
}


class PatchEmbed(nn.Module):
    """Non-overlapping patches: `[B, H, W, Cin]` -> `[B, rows, columns, width]`.

    Attributes:
      padding: rows and columns of zeros on either side of the image.
      use_bias: adds a bias per channel.
    """

    patch: tuple[int, int]
    width: int
    padding: tuple[int, int] = (0, 0)
    dtype: Dtype = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, images: Array) -> Array:
        padding = [(p, p) for p in self.padding]
        options = {"name": "proj", "dtype": self.dtype, "use_bias": self.use_bias}
        return conv(images, self.width, self.patch, self.patch, padding, **options)


class ConvStem(nn.Module):
    """Convolutions and pooling instead of one patch product: a convolutional tokenizer.

    Hassani et al. 2021, "Escaping the Big Data Paradigm with Compact
    Transformers" (section 3.2): 3x3 convolution, ReLU, max-pooling by 2, as often
    as the patch is halved (pooling windows of 2x2 here): `[B, H, W, Cin]` ->
    `[B, H / patch, W / patch, width]`, patch a power of 2. Small models train in
    far fewer epochs with it.

    Attributes:
      padding: rows and columns of zeros on either side of the image; what fills
        no patch then, at the bottom and on the right, is left out.
    """

    patch: tuple[int, int]
    width: int
    padding: tuple[int, int] = (0, 0)
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        steps = self.patch[0].bit_length() - 1
        x = _padded(images, self.padding, self.patch[0])
        for step in range(steps):
            channels = self.width >> (steps - 1 - step)
            x = nn.relu(conv(x, channels, (3, 3), 1, 1, name=f"conv_{step}", dtype=self.dtype))
            batch, height, width, _ = x.shape
            x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
        return x


def _padded(images: Array, padding: tuple[int, int], patch: int) -> Array:
    """Zeros on either side, then cut to whole patches."""
    images = jnp.pad(images, ((0, 0), *((p, p) for p in padding), (0, 0)))
    height, width = (side // patch * patch for side in images.shape[1:3])
    return images[:, :height, :width]


class Mlp(nn.Module):
    """Two linear layers, between them an activation: `[B, T, C]` -> `[B, T, width]`, by default width = C.

    `norm_eps` is the epsilon of a LayerNorm before the second one, None for none. With `split`
    the first one is two, `fc1_g` for the first half of the hidden channels (the gate of
    "swiglu") and `fc1_x` for the second.
    """

    hidden: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    width: int | None = None
    activation: Callable[[Array], Array] = gelu
    use_bias: bool = True
    norm_eps: float | None = None
    split: bool = False

    @nn.compact
    def __call__(self, x: Array, draws: sample.Draws | None = None, path: tuple[int, ...] = ()) -> Array:
        """`draws` turns dropout on; `path` numbers the layer."""
        width = self.width or x.shape[-1]
        options = {"dtype": self.dtype, "use_bias": self.use_bias}
        if self.split:
            halves = [dense(self.hidden // 2, name=name, **options)(x) for name in ("fc1_g", "fc1_x")]
            x = jnp.concatenate(halves, axis=-1)
        else:
            x = dense(self.hidden, name="fc1", **options)(x)
        x = self.activation(x)
        x = drop(x, self.dropout, draws, *path, 0)
        if self.norm_eps is not None:
            x = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)
        x = dense(width, name="fc2", **options)(x)
        return drop(x, self.dropout, draws, *path, 1)


class DepthwiseConv(nn.Module):
    """A filter per channel: `[B, H, W, C]` -> `[B, h, w, C]`, parameters as a grouped `nn.Conv`.

    Attributes:
      kernel: taps per axis.
      stride, padding: see `ops.depthwise`.
      use_bias: adds a bias per channel.
      kernel_init: of the filters, by default torch's; biases start at zero then only if it is given.
    """

    kernel: int
    stride: int = 1
    padding: int = 0
    use_bias: bool = True
    kernel_init: Any = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        usual = torch_uniform(self.kernel**2)
        shape = (self.kernel, self.kernel, 1, x.shape[-1])
        kernel = self.param("kernel", self.kernel_init or usual, shape)
        y = depthwise(x.astype(self.dtype), kernel, stride=self.stride, padding=self.padding)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros if self.kernel_init else usual, shape[-1:])
        return y + bias.astype(y.dtype)[None, None, None]


class LayerScale(nn.Module):
    """A learnt factor per channel on a residual branch."""

    value: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gamma = self.param("gamma", nn.initializers.constant(self.value), (x.shape[-1],))
        return x * gamma.astype(x.dtype)[None, None, :]


def drop_path(x: Array, rate: float, draws: sample.Draws | None, *path: int) -> Array:
    """Stochastic depth of a residual branch, off without `draws`."""
    return x if draws is None or rate == 0.0 else sample.drop_path(x, rate, draws, *path)


def drop(x: Array, rate: float, draws: sample.Draws | None, *path: int) -> Array:
    """Dropout, off without `draws`."""
    return x if draws is None or rate == 0.0 else sample.dropout(x, rate, draws, *path)
