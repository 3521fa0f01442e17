"""Pillow's image operations in TensorFlow, to the grey level.

Each function takes and returns one uint8 image `[h, w, C]` of static shape, C
either 1 (Pillow's mode L) or 3 (RGB), and follows Pillow's arithmetic: blends
and warps cut off the fraction, tables are exact. What depends on the
histogram is a table of 256 entries per channel; elsewhere arithmetic on whole
images is faster than TensorFlow's gather.
"""

from __future__ import annotations

from typing import Any

from dyntoken.data.tf_import import tensorflow


def _look_up(image: Any, table: Any) -> Any:
    """Maps every value; table: `[256]` or, per channel, `[C, 256]`, within 0..255."""
    tf = tensorflow()
    channels = image.shape[-1]
    index = tf.cast(image, tf.int32)
    if table.shape.rank == 2:
        index += 256 * tf.range(channels)
    return tf.gather(tf.reshape(tf.cast(table, tf.uint8), [-1]), index)


def _whole(x: Any) -> Any:
    """Float -> uint8 as C does it: clipped, the fraction cut off."""
    tf = tensorflow()
    return tf.cast(tf.clip_by_value(x, 0.0, 255.0), tf.uint8)


def _levels() -> Any:
    tf = tensorflow()
    return tf.range(256)


def _grey(image: Any) -> Any:
    """Luma, int32 `[h, w, 1]` (ITU-R 601-2 in Pillow's 16-bit fixed point)."""
    tf = tensorflow()
    wide = tf.cast(image, tf.int32)
    if image.shape[-1] == 1:
        return wide
    red, green, blue = wide[..., :1], wide[..., 1:2], wide[..., 2:]
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) // 0x10000


def _blend(base: Any, image: Any, factor: Any) -> Any:
    """`base` at factor 0, `image` at 1, and beyond."""
    tf = tensorflow()
    base = tf.cast(base, tf.float32)
    return _whole(base + factor * (tf.cast(image, tf.float32) - base))


def autocontrast(image: Any) -> Any:
    """Stretches each channel to 0..255."""
    tf = tensorflow()
    low = tf.cast(tf.reduce_min(image, (0, 1)), tf.float64)[:, None]  # [C, 1]
    high = tf.cast(tf.reduce_max(image, (0, 1)), tf.float64)[:, None]
    scale = 255.0 / tf.maximum(high - low, 1.0)
    levels = tf.cast(_levels(), tf.float64)[None]
    stretched = tf.clip_by_value(levels * scale - low * scale, 0.0, 255.0)  # [C, 256]
    return _look_up(image, tf.where(high > low, stretched, levels))


def equalize(image: Any) -> Any:
    """Flattens the histogram of each channel."""
    tf = tensorflow()
    channels = image.shape[-1]
    index = tf.cast(image, tf.int32) + 256 * tf.range(channels)
    bins = 256 * channels
    counts = tf.math.bincount(tf.reshape(index, [-1]), minlength=bins, maxlength=bins)
    counts = tf.reshape(counts, (channels, 256))
    before = tf.cumsum(counts, axis=1, exclusive=True)
    # Pixels below the brightest value that occurs, shared among 255 steps.
    below = tf.reduce_max(tf.where(counts > 0, before, 0), 1, keepdims=True)  # [C, 1]
    step = below // 255
    table = tf.minimum((step // 2 + before) // tf.maximum(step, 1), 255)
    return _look_up(image, tf.where(step > 0, table, _levels()[None]))


def invert(image: Any) -> Any:
    """The negative."""
    return 255 - image


def posterize(image: Any, bits: Any) -> Any:
    """Keeps the top `bits` (int32, 0..8) of each value."""
    tf = tensorflow()
    mask = tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8)
    return tf.bitwise.bitwise_and(image, mask)


def solarize(image: Any, threshold: Any) -> Any:
    """Inverts the values at and above an int32 threshold."""
    tf = tensorflow()
    return tf.where(tf.cast(image, tf.int32) < threshold, image, 255 - image)


def solarize_add(image: Any, add: Any, threshold: int = 128) -> Any:
    """Adds an int32, at most 256 - threshold, to the values below a threshold."""
    tf = tensorflow()
    return tf.where(image < threshold, image + tf.cast(add, tf.uint8), image)


def brightness(image: Any, factor: Any) -> Any:
    """Towards black at factor 0, away from it beyond 1."""
    tf = tensorflow()
    return _whole(factor * tf.cast(image, tf.float32))


def contrast(image: Any, factor: Any) -> Any:
    """Towards the mean luma at factor 0, away from it beyond 1."""
    tf = tensorflow()
    rows = tf.reduce_sum(_grey(image), (1, 2))
    total = tf.reduce_sum(tf.cast(rows, tf.float64))
    mean = tf.cast(total / (image.shape[0] * image.shape[1]) + 0.5, tf.int32)
    return _blend(mean, image, factor)


def color(image: Any, factor: Any) -> Any:
    """Towards grey at factor 0, away from it beyond 1."""
    return image if image.shape[-1] == 1 else _blend(_grey(image), image, factor)


def sharpness(image: Any, factor: Any) -> Any:
    """Towards a 3 x 3 smoothing at factor 0, away from it beyond 1; the border stays."""
    tf = tensorflow()
    height, width, _ = image.shape
    if min(height, width) < 3:
        return image
    wide = tf.cast(image, tf.float32)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    inner = wide[1:-1, 1:-1]
    around = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4.0 * inner
    smooth = tf.floor(around * (1.0 / 13.0) + 0.5)
    middle = _whole(smooth + factor * (inner - smooth))
    middle = tf.concat([image[1:-1, :1], middle, image[1:-1, -1:]], 1)
    return tf.concat([image[:1], middle, image[-1:]], 0)


def _taps(fraction: Any, interpolation: str) -> list[Any]:
    """Weights of the pixels -1, 0, 1, 2 around a point `fraction` past pixel 0."""
    tf = tensorflow()
    d = fraction
    if interpolation == "bilinear":
        return [tf.zeros_like(d), 1.0 - d, d, tf.zeros_like(d)]
    # Keys' cubic with a = -1, which Pillow's warps use (its resize has a = -0.5).
    e = 1.0 - d
    return [-d * e * e, 1.0 + d * d * (d - 2.0), 1.0 + e * e * (e - 2.0), -e * d * d]


def _filled(out: Any, known: Any, fill: tuple[int, ...]) -> Any:
    tf = tensorflow()
    return tf.where(known, _whole(out), tf.constant(fill, tf.uint8))


def slide_rows(image: Any, offset: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Shifts each row by its own amount: pixel x comes from `x + offset[row]`.

    Args:
      image: uint8 `[h, w, C]`.
      offset: float32 `[h]`, in pixels.
      interpolation: "bicubic" or "bilinear".
      fill: C grey levels for what lies outside.
    """
    tf = tensorflow()
    height, width, channels = image.shape
    whole = tf.floor(offset)
    first = tf.cast(whole, tf.int32) - 1  # source of the leftmost tap of pixel 0
    source = tf.clip_by_value(first[:, None] + tf.range(width + 3)[None], 0, width - 1)  # [h, w + 3]
    source += width * tf.range(height)[:, None]
    taken = tf.cast(tf.gather(tf.reshape(image, (-1, channels)), source), tf.float32)
    taps = _taps(offset - whole, interpolation)
    out = sum(tap[:, None, None] * taken[:, i : i + width] for i, tap in enumerate(taps))
    at = tf.range(width, dtype=tf.float32)[None] + 0.5 + offset[:, None]  # [h, w]
    return _filled(out, ((at >= 0.0) & (at < width))[..., None], fill)


def shear_x(image: Any, factor: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Slides rows by `factor` pixels per pixel of height."""
    tf = tensorflow()
    offset = factor * (tf.range(image.shape[0], dtype=tf.float32) + 0.5)
    return slide_rows(image, offset, interpolation, fill)


def translate_x(image: Any, share: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Moves the picture left by `share` of the width."""
    tf = tensorflow()
    height, width, _ = image.shape
    return slide_rows(image, tf.fill((height,), share * width), interpolation, fill)


def shear_y(image: Any, factor: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Slides columns by `factor` pixels per pixel of width."""
    return _turned(shear_x(_turned(image), factor, interpolation, fill))


def translate_y(image: Any, share: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Moves the picture up by `share` of the height."""
    return _turned(translate_x(_turned(image), share, interpolation, fill))


def _turned(image: Any) -> Any:
    return tensorflow().transpose(image, (1, 0, 2))


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
    across = tf.stack(_taps(at_x - 0.5 - left, interpolation), -1)[..., None]  # [h, w, 4, 1]
    down = _taps(at_y - 0.5 - top, interpolation)
    # Four neighbours of a row lie side by side, so that one gather fetches them.
    column = tf.clip_by_value(tf.cast(left, tf.int32), -2, width) + 2  # of the leftmost tap, in `wide`
    wide = tf.concat([image[:, :1]] * 3 + [image] + [image[:, -1:]] * 3, 1)  # [h, w + 6, C]
    quads = tf.concat([wide[:, i : i + width + 3] for i in range(4)], -1)  # [h, w + 3, 4 C]
    quads = tf.reshape(quads, (-1, 4 * channels))
    out = 0.0
    for i in range(4):
        row = tf.clip_by_value(tf.cast(top, tf.int32) + (i - 1), 0, height - 1)
        taken = tf.cast(tf.gather(quads, row * (width + 3) + column), tf.float32)  # [h, w, 4 C]
        taken = tf.reshape(taken, (height, width, 4, channels))
        out += down[i][..., None] * tf.reduce_sum(taken * across, 2)
    known = (at_x >= 0.0) & (at_x < width) & (at_y >= 0.0) & (at_y < height)
    return _filled(out, known[..., None], fill)
