"""Pillow's image operations in TensorFlow, to the grey level.

Each function takes and returns one uint8 image `[h, w, C]` of static shape, C
either 1 (Pillow's mode L) or 3 (RGB), and follows Pillow's arithmetic: blends cut
off the fraction. `randaugment` has XLA compile them. Alone, on one CPU core,
TensorFlow is fast with float32 arithmetic along rows; a table look-up, `tf.where`
on bytes, or a broadcast over three channels takes ten times as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dyntoken.data.tf_import import optimization_barrier, tf

_STAGES = 2  # of `_circular_shift`, of which XLA makes one pass over the image


def _flat(image: Any) -> Any:
    """`[h, w, C]` -> `[h, w C]`: TensorFlow broadcasts along a row fast, along three channels slowly."""
    height, width, channels = image.shape
    return tf.reshape(image, (height, width * channels))


def _along(row: Any, image: Any) -> Any:
    """A value per channel `[C]` as a row `[w C]` of `_flat(image)`."""
    return optimization_barrier(tf.tile(row, [image.shape[1]]), image)


def _float(image: Any) -> Any:
    return tf.cast(_flat(image), tf.float32)


def _as_levels(x: Any) -> Any:
    """Float -> uint8 as C does it: clipped, the fraction cut off."""
    return tf.cast(tf.minimum(tf.maximum(x, 0.0), 255.0), tf.uint8)


def _image(x: Any, like: Any) -> Any:
    """Float `[h, w C]` -> uint8 `[h, w, C]` shaped as `like`."""
    return tf.reshape(_as_levels(x), like.shape)


def _grey(image: Any) -> Any:
    """Luma of RGB in every channel, float32 `[h w, 3]` (ITU-R 601-2 in Pillow's 16-bit fixed point).

    The sums are integers below 2^24: exact in float32.
    """
    shares = tf.constant([[19595.0] * 3, [38470.0] * 3, [7471.0] * 3])
    wide = tf.matmul(tf.cast(tf.reshape(image, (-1, 3)), tf.float32), shares)
    return tf.floor((wide + 32768.0) * (1.0 / 65536.0))


def autocontrast(image: Any) -> Any:
    """Stretches each channel to 0..255."""
    _, width, channels = image.shape

    def extreme(reduce: Any) -> Any:
        columns = optimization_barrier(reduce(_flat(image), 0), image)
        return tf.cast(reduce(tf.reshape(columns, (width, channels)), 0), tf.float32)  # [C]

    low, high = extreme(tf.reduce_min), extreme(tf.reduce_max)
    flat = high <= low
    scale = tf.where(flat, 1.0, 255.0 / tf.maximum(high - low, 1.0))
    # A whole number must not fall below itself: the levels are at least 1/255 apart.
    shift = tf.where(flat, 0.0, 1e-3 - low * scale)
    return _image(_float(image) * _along(scale, image) + _along(shift, image), image)


def equalize(image: Any) -> Any:
    """Flattens the histogram of each channel."""
    width, channels = image.shape[1:]
    bins = 256 * channels
    rows = np.tile(256 * np.arange(channels, dtype=np.int32), width)
    index = optimization_barrier(tf.cast(_flat(image), tf.int32) + rows, image)
    # Not tf.math.bincount, which takes XLA seconds to compile.
    counts = tf.raw_ops.Bincount(arr=tf.reshape(index, [-1]), size=bins, weights=tf.zeros((0,), tf.int32))
    counts = tf.reshape(counts, (channels, 256))
    before = tf.cumsum(counts, axis=1, exclusive=True)
    # Pixels below the brightest value that occurs, shared among 255 steps.
    below = tf.reduce_max(tf.where(counts > 0, before, 0), 1, keepdims=True)  # [C, 1]
    step = below // 255
    table = tf.minimum((step // 2 + before) // tf.maximum(step, 1), 255)
    table = optimization_barrier(tf.cast(tf.where(step > 0, table, tf.range(256)[None]), tf.uint8), image)
    return tf.reshape(tf.gather(tf.reshape(table, [-1]), index), image.shape)


def invert(image: Any) -> Any:
    """The negative."""
    return 255 - image


def posterize(image: Any, bits: Any) -> Any:
    """Keeps the top `bits` (int32, 0..8) of each value."""
    mask = tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8)
    return tf.bitwise.bitwise_and(image, mask)


def _from(wide: Any, threshold: Any) -> Any:
    """1 for whole numbers at and above a whole threshold, else 0; many times faster than `tf.where`."""
    return tf.minimum(tf.maximum(wide - (tf.cast(threshold, tf.float32) - 1.0), 0.0), 1.0)


def solarize(image: Any, threshold: Any) -> Any:
    """Inverts the values at and above an int32 threshold."""
    wide = _float(image)
    return _image(wide + _from(wide, threshold) * (255.0 - 2.0 * wide), image)


def solarize_add(image: Any, add: Any, threshold: int = 128) -> Any:
    """Adds an int32, at most 256 - threshold, to the values below a threshold."""
    wide = _float(image)
    return _image(wide + tf.cast(add, tf.float32) * (1.0 - _from(wide, threshold)), image)


def brightness(image: Any, factor: Any) -> Any:
    """Towards black at factor 0, away from it beyond 1."""
    return _image(factor * _float(image), image)


def contrast(image: Any, factor: Any) -> Any:
    """Towards the mean luma at factor 0, away from it beyond 1."""
    height, width, channels = image.shape
    grey = _float(image) if channels == 1 else tf.reshape(_grey(image), (height, -1))
    total = tf.reduce_sum(tf.cast(tf.reduce_sum(grey, 0), tf.float64))
    mean = tf.cast(tf.floor(total / (height * width * channels) + 0.5), tf.float32)
    return _image(mean + factor * (_float(image) - mean), image)


def color(image: Any, factor: Any) -> Any:
    """Towards grey at factor 0, away from it beyond 1."""
    if image.shape[-1] == 1:
        return image
    grey = tf.reshape(_grey(image), (image.shape[0], -1))
    return _image(grey + factor * (_float(image) - grey), image)


def sharpness(image: Any, factor: Any) -> Any:
    """Towards a 3 x 3 smoothing at factor 0, away from it beyond 1; the border stays."""
    height, width, c = image.shape
    if min(height, width) < 3:
        return image
    wide = _float(image)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    inner = wide[1:-1, c:-c]
    around = rows[:, : -2 * c] + rows[:, c:-c] + rows[:, 2 * c :] + 4.0 * inner
    smooth = tf.floor(around * (1.0 / 13.0) + 0.5)
    middle = _as_levels(smooth + factor * (inner - smooth))
    flat = _flat(image)
    middle = tf.concat([flat[1:-1, :c], middle, flat[1:-1, -c:]], 1)
    return tf.reshape(tf.concat([flat[:1], middle, flat[-1:]], 0), image.shape)


# Affine transformations. Pixel centres lie at halves; a pixel whose source lies outside the
# image gets the fill colour; the fraction of a mixed grey level is cut off, as in Pillow.


def shear(image: Any, factor: Any, axis: int, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Moves pixels along an axis by `factor` per pixel of the other one."""
    return _shift_lines(image, factor * _centres(image, 1 - axis), axis, interpolation, fill)


def translate(image: Any, share: Any, axis: int, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Moves the picture left (axis 1) or up (axis 0) by a share of its side."""
    side = np.full_like(_centres(image, 1 - axis), image.shape[axis])
    return _shift_lines(image, share * side, axis, interpolation, fill)


def _centres(image: Any, axis: int) -> np.ndarray:
    """Where pixels lie: float32 `[h, 1]` along rows, `[1, w C]` along columns."""
    place = np.arange(image.shape[axis], dtype=np.float32) + np.float32(0.5)
    return np.repeat(place, image.shape[2])[None] if axis else place[:, None]


def _taps(fraction: Any, interpolation: str) -> list[Any]:
    """Weights of the pixels -1, 0, 1, 2 around a point `fraction` past pixel 0."""
    d = fraction
    if interpolation == "bilinear":
        return [tf.zeros_like(d), 1.0 - d, d, tf.zeros_like(d)]
    # Keys' cubic with a = -1, which Pillow's warps use (its resize has a = -0.5).
    e = 1.0 - d
    return [-d * e * e, 1.0 + d * d * (d - 2.0), 1.0 + e * e * (e - 2.0), -e * d * d]


def _shift_lines(image: Any, offset: Any, axis: int, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Pixel x of axis 1 comes from `x + offset` of its row; of axis 0 likewise.

    Whole pixels first, then the fraction, for which neighbours have the same weights.
    `offset` is float32 in pixels, of the shape that `_centres` has for the other axis.
    """
    height, width, channels = image.shape
    size, unit = image.shape[axis], channels if axis else 1
    offset = optimization_barrier(offset, image)
    whole = tf.floor(offset)
    # The edge twice more on both sides: as far as the weights of a point inside reach.
    lines = tf.reshape(image, (height, width * channels))
    first, last = _cut(lines, 0, unit, axis), _cut(lines, (size - 1) * unit, size * unit, axis)
    lines = tf.concat([first, first, lines, last, last], axis)
    moved = _circular_shift(lines, tf.cast(whole, tf.int32) + 1, axis, (size + 3) * unit, unit, image)
    mixed = 0.0
    for i, tap in enumerate(_taps(offset - whole, interpolation)):
        mixed += tap * tf.cast(_cut(moved, i * unit, (i + size) * unit, axis), tf.float32)
    at = offset + _centres(image, axis)
    known = (at >= 0.0) & (at < size)
    colour = np.tile(np.array(fill, np.uint8), width)[None]
    return tf.reshape(tf.where(known, _as_levels(mixed), colour), image.shape)


def _cut(lines: Any, start: int, stop: int, axis: int) -> Any:
    return lines[:, start:stop] if axis else lines[start:stop]


def _circular_shift(lines: Any, start: Any, axis: int, count: int, unit: int, argument: Any) -> Any:
    """`count` values of each line from a drawn start on, and from the first again after the last.

    A line that starts at s is the sum of steps of 1, 2, 4, ... places, each of which is
    taken or not. That is a few selections among neighbouring bytes, of which a
    processor does dozens at a time; a gather takes one pixel after the other.

    Args:
      lines: uint8 `[h, w]`, which lie along `axis`.
      start: int32 `[h, 1]` or `[1, w]`, in units.
      unit: values that move together.
      argument: of `optimization_barrier`.
    """
    size = lines.shape[axis] // unit
    start = optimization_barrier(tf.math.floormod(start, size), argument)
    steps = (size - 1).bit_length()
    need = count + ((1 << steps) - 1) * unit
    times = -(-need // lines.shape[axis])
    lines = optimization_barrier(_cut(tf.concat([lines] * times, axis), 0, need, axis), argument)
    for step in reversed(range(steps)):
        need -= unit << step
        ahead = _cut(lines, unit << step, (unit << step) + need, axis)
        lines = tf.where((start & (1 << step)) > 0, ahead, _cut(lines, 0, need, axis))
        if step % _STAGES == 0:
            lines = optimization_barrier(lines, argument)
    return lines


def rotate(image: Any, degrees: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Turns the picture counter-clockwise about its centre; the size stays."""
    height, width, channels = image.shape
    angle = degrees * (3.141592653589793 / 180.0)
    cos, sin = tf.cos(angle), tf.sin(angle)
    x = tf.range(width, dtype=tf.float32)[None] + (0.5 - width / 2)
    y = tf.range(height, dtype=tf.float32)[:, None] + (0.5 - height / 2)
    at_x, at_y = cos * x - sin * y + width / 2, sin * x + cos * y + height / 2  # [h, w]
    left, top = tf.floor(at_x - 0.5), tf.floor(at_y - 0.5)
    across = _taps(at_x - 0.5 - left, interpolation)
    down = _taps(at_y - 0.5 - top, interpolation)
    columns = [tf.clip_by_value(tf.cast(left, tf.int32) + (i - 1), 0, width - 1) for i in range(4)]
    pixels = tf.reshape(tf.cast(image, tf.float32), (-1, channels))
    out = 0.0
    for j in range(4):
        row = width * tf.clip_by_value(tf.cast(top, tf.int32) + (j - 1), 0, height - 1)
        line = sum(across[i][..., None] * tf.gather(pixels, row + columns[i]) for i in range(4))
        out += down[j][..., None] * line
    known = (at_x >= 0.0) & (at_x < width) & (at_y >= 0.0) & (at_y < height)
    return tf.where(known[..., None], _as_levels(out), tf.constant(fill, tf.uint8))
