"""Pillow's affine transformations in TensorFlow: shears, translations, rotation.

As in `pillow_ops`, an image is uint8 `[h, w, C]` of static shape, C 1 or 3. Pixel
centres lie at halves; a pixel whose source lies outside the image gets the fill
colour; the fraction of a mixed grey level is cut off, as in Pillow.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dyntoken.data.pillow_ops import as_levels
from dyntoken.data.tf_import import tensorflow
from dyntoken.data.xla import once

_STAGES = 2  # of `_turned`, of which XLA makes one pass over the image


def shear_x(image: Any, factor: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Slides rows by `factor` pixels per pixel of height."""
    return _slide(image, factor * _centres(image, 0), 1, interpolation, fill)


def shear_y(image: Any, factor: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Slides columns by `factor` pixels per pixel of width."""
    return _slide(image, factor * _centres(image, 1), 0, interpolation, fill)


def translate_x(image: Any, share: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Moves the picture left by `share` of the width."""
    return _slide(image, share * np.full_like(_centres(image, 0), image.shape[1]), 1, interpolation, fill)


def translate_y(image: Any, share: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Moves the picture up by `share` of the height."""
    return _slide(image, share * np.full_like(_centres(image, 1), image.shape[0]), 0, interpolation, fill)


def _centres(image: Any, axis: int) -> np.ndarray:
    """Where pixels lie: float32 `[h, 1]` along rows, `[1, w C]` along columns."""
    place = np.arange(image.shape[axis], dtype=np.float32) + np.float32(0.5)
    return np.repeat(place, image.shape[2])[None] if axis else place[:, None]


def _taps(fraction: Any, interpolation: str) -> list[Any]:
    """Weights of the pixels -1, 0, 1, 2 around a point `fraction` past pixel 0."""
    tf = tensorflow()
    d = fraction
    if interpolation == "bilinear":
        return [tf.zeros_like(d), 1.0 - d, d, tf.zeros_like(d)]
    # Keys' cubic with a = -1, which Pillow's warps use (its resize has a = -0.5).
    e = 1.0 - d
    return [-d * e * e, 1.0 + d * d * (d - 2.0), 1.0 + e * e * (e - 2.0), -e * d * d]


def _slide(image: Any, offset: Any, axis: int, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Pixel x of axis 1 comes from `x + offset` of its row; of axis 0 likewise.

    Whole pixels first, then the fraction, for which neighbours have the same weights.

    Args:
      image: uint8 `[h, w, C]`.
      offset: float32, in pixels, of the shape that `_centres` has for the other axis.
      axis: along which to move.
      interpolation: "bicubic" or "bilinear".
      fill: C grey levels for what lies outside.
    """
    tf = tensorflow()
    height, width, channels = image.shape
    size, unit = image.shape[axis], channels if axis else 1
    offset = once(offset, image)
    whole = tf.floor(offset)
    # The edge twice more on both sides: as far as the weights of a point inside reach.
    lines = tf.reshape(image, (height, width * channels))
    first, last = _cut(lines, 0, unit, axis), _cut(lines, (size - 1) * unit, size * unit, axis)
    lines = tf.concat([first, first, lines, last, last], axis)
    moved = _turned(lines, tf.cast(whole, tf.int32) + 1, axis, (size + 3) * unit, unit, image)
    mixed = 0.0
    for i, tap in enumerate(_taps(offset - whole, interpolation)):
        mixed += tap * tf.cast(_cut(moved, i * unit, (i + size) * unit, axis), tf.float32)
    at = offset + _centres(image, axis)
    known = (at >= 0.0) & (at < size)
    colour = np.tile(np.array(fill, np.uint8), width)[None]
    return tf.reshape(tf.where(known, as_levels(mixed), colour), image.shape)


def _cut(lines: Any, start: int, stop: int, axis: int) -> Any:
    return lines[:, start:stop] if axis else lines[start:stop]


def _turned(lines: Any, start: Any, axis: int, count: int, unit: int, argument: Any) -> Any:
    """`count` values of each line from a drawn start on, and from the first again after the last.

    A line that starts at s is the sum of steps of 1, 2, 4, ... places, each of which is
    taken or not. That is a few selections among neighbouring bytes, of which a
    processor does dozens at a time, where reading each pixel from its own place takes
    it one after the other.

    Args:
      lines: uint8 `[h, w]`.
      start: int32 `[h, 1]` or `[1, w]`, in units.
      axis: along which lines lie.
      count: of values, at most as many as there are.
      unit: values that move together.
      argument: of `once`.
    """
    tf = tensorflow()
    size = lines.shape[axis] // unit
    start = once(tf.math.floormod(start, size), argument)
    steps = (size - 1).bit_length()
    need = count + ((1 << steps) - 1) * unit
    times = -(-need // lines.shape[axis])
    lines = once(_cut(tf.concat([lines] * times, axis), 0, need, axis), argument)
    for step in reversed(range(steps)):
        need -= unit << step
        ahead = _cut(lines, unit << step, (unit << step) + need, axis)
        lines = tf.where((start & (1 << step)) > 0, ahead, _cut(lines, 0, need, axis))
        if step % _STAGES == 0:
            lines = once(lines, argument)
    return lines


def rotate(image: Any, degrees: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Turns the picture counter-clockwise about its centre; the size stays."""
    tf = tensorflow()
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
    return tf.where(known[..., None], as_levels(out), tf.constant(fill, tf.uint8))
