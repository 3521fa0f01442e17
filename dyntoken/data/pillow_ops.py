"""Pillow's image operations in TensorFlow, to the grey level.

Each function takes and returns one uint8 image `[h, w, C]` of static shape, C
either 1 (Pillow's mode L) or 3 (RGB), and follows Pillow's arithmetic: blends cut
off the fraction. `distort` has XLA compile them; the warps are in `warps`. Alone,
on one CPU core, TensorFlow is fast with float32 arithmetic along rows; a table
look-up, `tf.where` on bytes, or a broadcast over three channels takes ten times as
long.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dyntoken.data.tf_import import tensorflow
from dyntoken.data.xla import once


def _flat(image: Any) -> Any:
    """`[h, w, C]` -> `[h, w C]`: TensorFlow broadcasts along a row fast, along three channels slowly."""
    height, width, channels = image.shape
    return tensorflow().reshape(image, (height, width * channels))


def _along(row: Any, image: Any) -> Any:
    """A value per channel `[C]` as a row `[w C]` of `_flat(image)`."""
    return once(tensorflow().tile(row, [image.shape[1]]), image)


def _float(image: Any) -> Any:
    tf = tensorflow()
    return tf.cast(_flat(image), tf.float32)


def as_levels(x: Any) -> Any:
    """Float -> uint8 as C does it: clipped, the fraction cut off."""
    tf = tensorflow()
    return tf.cast(tf.minimum(tf.maximum(x, 0.0), 255.0), tf.uint8)


def _image(x: Any, like: Any) -> Any:
    """Float `[h, w C]` -> uint8 `[h, w, C]` shaped as `like`."""
    return tensorflow().reshape(as_levels(x), like.shape)


def _grey(image: Any) -> Any:
    """Luma of RGB in every channel, float32 `[h w, 3]` (ITU-R 601-2 in Pillow's 16-bit fixed point).

    The sums are integers below 2^24: exact in float32.
    """
    tf = tensorflow()
    shares = tf.constant([[19595.0] * 3, [38470.0] * 3, [7471.0] * 3])
    wide = tf.matmul(tf.cast(tf.reshape(image, (-1, 3)), tf.float32), shares)
    return tf.floor((wide + 32768.0) * (1.0 / 65536.0))


def autocontrast(image: Any) -> Any:
    """Stretches each channel to 0..255."""
    tf = tensorflow()
    _, width, channels = image.shape

    def extreme(reduce: Any) -> Any:
        columns = once(reduce(_flat(image), 0), image)
        return tf.cast(reduce(tf.reshape(columns, (width, channels)), 0), tf.float32)  # [C]

    low, high = extreme(tf.reduce_min), extreme(tf.reduce_max)
    flat = high <= low
    scale = tf.where(flat, 1.0, 255.0 / tf.maximum(high - low, 1.0))
    # A whole number must not fall below itself: the levels are at least 1/255 apart.
    shift = tf.where(flat, 0.0, 1e-3 - low * scale)
    return _image(_float(image) * _along(scale, image) + _along(shift, image), image)


def equalize(image: Any) -> Any:
    """Flattens the histogram of each channel."""
    tf = tensorflow()
    width, channels = image.shape[1:]
    bins = 256 * channels
    rows = np.tile(256 * np.arange(channels, dtype=np.int32), width)
    index = once(tf.cast(_flat(image), tf.int32) + rows, image)
    # Not tf.math.bincount, which takes XLA seconds to compile.
    counts = tf.raw_ops.Bincount(arr=tf.reshape(index, [-1]), size=bins, weights=tf.zeros((0,), tf.int32))
    counts = tf.reshape(counts, (channels, 256))
    before = tf.cumsum(counts, axis=1, exclusive=True)
    # Pixels below the brightest value that occurs, shared among 255 steps.
    below = tf.reduce_max(tf.where(counts > 0, before, 0), 1, keepdims=True)  # [C, 1]
    step = below // 255
    table = tf.minimum((step // 2 + before) // tf.maximum(step, 1), 255)
    table = once(tf.cast(tf.where(step > 0, table, tf.range(256)[None]), tf.uint8), image)
    return tf.reshape(tf.gather(tf.reshape(table, [-1]), index), image.shape)


def invert(image: Any) -> Any:
    """The negative."""
    return 255 - image


def posterize(image: Any, bits: Any) -> Any:
    """Keeps the top `bits` (int32, 0..8) of each value."""
    tf = tensorflow()
    mask = tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8)
    return tf.bitwise.bitwise_and(image, mask)


def _from(wide: Any, threshold: Any) -> Any:
    """1 for whole numbers at and above a whole threshold, else 0 (many times faster than `tf.where`)."""
    tf = tensorflow()
    return tf.minimum(tf.maximum(wide - (tf.cast(threshold, tf.float32) - 1.0), 0.0), 1.0)


def solarize(image: Any, threshold: Any) -> Any:
    """Inverts the values at and above an int32 threshold."""
    wide = _float(image)
    return _image(wide + _from(wide, threshold) * (255.0 - 2.0 * wide), image)


def solarize_add(image: Any, add: Any, threshold: int = 128) -> Any:
    """Adds an int32, at most 256 - threshold, to the values below a threshold."""
    tf = tensorflow()
    wide = _float(image)
    return _image(wide + tf.cast(add, tf.float32) * (1.0 - _from(wide, threshold)), image)


def brightness(image: Any, factor: Any) -> Any:
    """Towards black at factor 0, away from it beyond 1."""
    return _image(factor * _float(image), image)


def contrast(image: Any, factor: Any) -> Any:
    """Towards the mean luma at factor 0, away from it beyond 1."""
    tf = tensorflow()
    height, width, channels = image.shape
    grey = _float(image) if channels == 1 else tf.reshape(_grey(image), (height, -1))
    total = tf.reduce_sum(tf.cast(tf.reduce_sum(grey, 0), tf.float64))
    mean = tf.cast(tf.floor(total / (height * width * channels) + 0.5), tf.float32)
    return _image(mean + factor * (_float(image) - mean), image)


def color(image: Any, factor: Any) -> Any:
    """Towards grey at factor 0, away from it beyond 1."""
    tf = tensorflow()
    if image.shape[-1] == 1:
        return image
    grey = tf.reshape(_grey(image), (image.shape[0], -1))
    return _image(grey + factor * (_float(image) - grey), image)


def sharpness(image: Any, factor: Any) -> Any:
    """Towards a 3 x 3 smoothing at factor 0, away from it beyond 1; the border stays."""
    tf = tensorflow()
    height, width, c = image.shape
    if min(height, width) < 3:
        return image
    wide = _float(image)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    inner = wide[1:-1, c:-c]
    around = rows[:, : -2 * c] + rows[:, c:-c] + rows[:, 2 * c :] + 4.0 * inner
    smooth = tf.floor(around * (1.0 / 13.0) + 0.5)
    middle = as_levels(smooth + factor * (inner - smooth))
    flat = _flat(image)
    middle = tf.concat([flat[1:-1, :c], middle, flat[1:-1, -c:]], 1)
    return tf.reshape(tf.concat([flat[:1], middle, flat[-1:]], 0), image.shape)
