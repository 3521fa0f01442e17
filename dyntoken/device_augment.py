"""Normalisation, soft targets, random erasing, mixup and CutMix, on the device and under `jit`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dyntoken import schema
from dyntoken.ops import mixing
from dyntoken.schema import NonNegative, Rate, Share
from dyntoken.types import Array

_ERASE = 1  # what the step's key is folded with for erasing
_ERASE_TRIES = 10


def normalize(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """`(images / 255 - mean) / std` in float32, of uint8 `[B, H, W, C]`.

    Mean and deviation are per channel, in units of the full range (0 to 1); any other
    number of them is a ValueError.
    """
    channels = images.shape[-1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"images have {channels} channels but mean has {len(mean)} and std {len(std)} numbers"
        )
    mean = jnp.asarray(mean, jnp.float32)[None, None, None, :]
    std = jnp.asarray(std, jnp.float32)[None, None, None, :]
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def soft_targets(labels: Array, num_classes: int, smoothing: float = 0.0) -> Array:
    """One-hot targets with label smoothing, `[B, num_classes]` float32.

    Every class gets `smoothing / num_classes`, the true one of `labels [B]` has
    `1 - smoothing` on top (timm's `one_hot`).
    """
    hot = labels[:, None] == jnp.arange(num_classes, dtype=labels.dtype)[None, :]
    return hot.astype(jnp.float32) * (1.0 - smoothing) + smoothing / num_classes


@functools.partial(schema.checked, owner="mix")  # as the section of a config
def mix(
    key: Array,
    images: Array,
    labels: Array,
    ids: Array | None = None,
    *,
    num_classes: int,
    mixup: NonNegative = 0.8,
    cutmix: NonNegative = 1.0,
    prob: Share = 1.0,
    switch_prob: Share = 0.5,
    smoothing: Rate = 0.1,
    erase: Share = 0.0,
) -> tuple[Array, Array]:
    """Random erasing, a draw per image, then mixup or CutMix of neighbours, one draw for the global batch.

    timm's `Mixup` in batch mode: one method, one lambda and one box, drawn from
    `key` alone. Unlike there, the partner of row 2i is row 2i + 1 and the other
    way round instead of the row counted from the end: pairs stay together on
    any number of devices, so that the result does not depend on it.

    Args:
      key: the step's key, the same on every device.
      images: `[B, H, W, C]` floating point; B is even, all or part of the batch.
      labels: `[B]` integers.
      ids: `[B]` integers, positions in the global batch; erasing needs them.
      num_classes: number of classes K.
      mixup: alpha of the Beta(alpha, alpha) that mixup draws lambda from; 0: no
        mixup.
      cutmix: the same for CutMix.
      prob: probability that the batch is mixed at all.
      switch_prob: probability of CutMix when both are on.
      smoothing: label smoothing.
      erase: probability of random erasing, 0.25 in DeiT; see `random_erase`.

    Returns:
      images as given, mixed, and soft targets `[B, K]` float32.

    Raises:
      ValueError: for an odd batch, erasing without `ids`, or an alpha or
        probability out of range.
    """
    if erase:
        if ids is None:
            raise ValueError(f"erase={erase} draws per image: give mix the rows' global positions (ids)")
        images = random_erase(jax.random.fold_in(key, _ERASE), images, ids, prob=erase)
    targets = soft_targets(labels, num_classes, smoothing)
    if max(mixup, cutmix) == 0 or prob == 0:
        return images, targets
    if images.shape[0] % 2:
        raise ValueError(
            f"mixup and cutmix pair rows 2i and 2i + 1, so each device needs an even number of images, "
            f"not {images.shape[0]}: change the batch size or set mixup and cutmix to 0"
        )
    weight, lam = draw(key, images.shape[1:3], mixup=mixup, cutmix=cutmix, prob=prob, switch_prob=switch_prob)
    own = weight[None, :, :, None]
    mixed = images.astype(jnp.float32) * own + mixing.partner(images).astype(jnp.float32) * (1.0 - own)
    return mixed.astype(images.dtype), targets * lam + mixing.partner(targets) * (1.0 - lam)


def random_erase(
    key: Array,
    images: Array,
    ids: Array,
    *,
    prob: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Array:
    """Random erasing as DeiT has it: a box of each image becomes normal noise.

    timm's `RandomErasing` in pixel mode (Zhong et al., arXiv:1708.04896): the
    images are normalised, and every value in the box is drawn from a standard
    normal distribution. That is why it happens here and not before the images
    become 8-bit, which would cut the noise off. Ten attempts at an area and an
    aspect ratio; the first that is lower and narrower than the image counts.

    Args:
      key: the step's key, the same on every device.
      images: `[B, H, W, C]` floating point, normalised.
      ids: `[B]` integers, positions in the global batch; they key the draws, so
        that the result does not depend on the number of devices.
      prob: probability per image.
      area: share of the image that the box covers.
      aspect: height / width of the box, log-uniform.
    """
    height, width = images.shape[1:3]
    row = jnp.arange(height)[:, None, None]
    column = jnp.arange(width)[None, :, None]

    def one(image: Array, number: Array) -> Array:
        draws, noise = jax.random.split(jax.random.fold_in(key, number))
        draws = jax.random.uniform(draws, (2 * _ERASE_TRIES + 3,))
        top, left, tall, wide = erase_box(draws, height, width, prob=prob, area=area, aspect=aspect)
        inside = (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)
        pixels = jax.random.normal(noise, image.shape, jnp.float32).astype(image.dtype)
        return jnp.where(inside, pixels, image)

    return jax.vmap(one)(images, ids)


def erase_box(
    draws: Array,
    height: int,
    width: int,
    *,
    prob: float,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[Array, Array, Array, Array]:
    """(top, left, height, width) of the box to erase, int32 scalars; of size 0 for none.

    The draws are `[23]` uniform in [0, 1): 10 areas, 10 ratios, two places, whether.
    """
    share = area[0] + draws[:_ERASE_TRIES] * (area[1] - area[0])
    log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
    ratio = jnp.exp(log_low + draws[_ERASE_TRIES : 2 * _ERASE_TRIES] * (log_high - log_low))
    tall = jnp.round(jnp.sqrt(share * (height * width) * ratio)).astype(jnp.int32)
    wide = jnp.round(jnp.sqrt(share * (height * width) / ratio)).astype(jnp.int32)
    fits = (tall < height) & (wide < width)
    first = jnp.argmax(fits)
    on = jnp.any(fits) & (draws[-1] < prob)
    tall, wide = jnp.where(on, tall[first], 0), jnp.where(on, wide[first], 0)
    top = jnp.minimum((draws[-3] * (height - tall + 1)).astype(jnp.int32), height - tall)
    left = jnp.minimum((draws[-2] * (width - wide + 1)).astype(jnp.int32), width - wide)
    return top, left, tall, wide


def draw(
    key: Array,
    shape: tuple[int, int],
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    prob: float = 1.0,
    switch_prob: float = 0.5,
) -> tuple[Array, Array]:
    """What `mix` draws for images of a shape (H, W) from the step's key; one of the two alphas is positive.

    Returns:
      `weight [H, W]` float32, lambda everywhere for mixup, 0 inside the box and
      1 outside for CutMix; and the scalar lambda, its mean. A box is clipped at
      the border and lambda is then that of the clipped box.
    """
    height, width = shape
    k_on, k_switch, k_beta, k_row, k_column = jax.random.split(key, 5)
    share = switch_prob if mixup > 0 and cutmix > 0 else float(cutmix > 0)
    cut = jax.random.uniform(k_switch) < share
    alpha = jnp.where(cut, jnp.float32(cutmix), jnp.float32(mixup))
    lam = _symmetric_beta(k_beta, alpha)
    rows = mixing.span(k_row, height, lam)
    columns = mixing.span(k_column, width, lam)
    box = (rows[:, None] & columns[None, :]).astype(jnp.float32)
    weight = jnp.where(cut, 1.0 - box, lam)
    lam = jnp.where(cut, 1.0 - jnp.sum(rows) * jnp.sum(columns) / (height * width), lam)
    on = jax.random.uniform(k_on) < prob
    return jnp.where(on, weight, 1.0), jnp.where(on, lam, 1.0)


def _symmetric_beta(key: Array, alpha: Array) -> Array:
    """One draw from Beta(alpha, alpha).

    In closed form, from Bailey's polar draw of Student's t with 2 alpha degrees
    of freedom (Devroye, "Random variate generation in one line of code", 1996):
    `jax.random.beta` takes seconds to compile into every training step.
    """
    u, v = jax.random.uniform(key, (2,), minval=jnp.finfo(jnp.float32).tiny)
    log_q = jnp.log(u) / alpha
    cosine, rest = jnp.cos(2 * jnp.pi * v), -jnp.expm1(log_q)
    share = cosine * jnp.sqrt(rest / (jnp.exp(log_q) + rest * cosine**2))
    return jnp.clip(0.5 + 0.5 * share, 0.0, 1.0)  # rounding may step outside
