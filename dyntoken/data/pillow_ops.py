"""Pillow's image operations in TensorFlow, to the grey level.

Each function takes and returns one uint8 image `[h, w, C]` of static shape, C
either 1 (Pillow's mode L) or 3 (RGB), and follows Pillow's arithmetic: blends
and warps cut off the fraction. `distort` has XLA compile them, all but the shears.
Alone, on one CPU core, TensorFlow is fast with float32 arithmetic along rows; a
table look-up, `tf.where` on bytes, or a broadcast over three channels takes ten
times as long.
"""

from __future__ import annotations

from typing import Any

from dyntoken.data.tf_import import tensorflow


def _flat(image: Any) -> Any:
    """`[h, w, C]` -> `[h, w C]`: TensorFlow broadcasts along a row fast, along three channels slowly."""
    height, width, channels = image.shape
    return tensorflow().reshape(image, (height, width * channels))


def _along(row: Any, image: Any) -> Any:
    """A value per channel `[C]` as a row `[w C]` of `_flat(image)`."""
    return tensorflow().tile(row, [image.shape[1]])


def _float(image: Any) -> Any:
    tf = tensorflow()
    return tf.cast(_flat(image), tf.float32)


def _whole(x: Any) -> Any:
    """Float -> uint8 as C does it: clipped, the fraction cut off."""
    tf = tensorflow()
    return tf.cast(tf.minimum(tf.maximum(x, 0.0), 255.0), tf.uint8)


def _image(x: Any, like: Any) -> Any:
    """Float `[h, w C]` -> uint8 `[h, w, C]` shaped as `like`."""
    return tensorflow().reshape(_whole(x), like.shape)


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
        columns = reduce(_flat(image), 0)
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
    channels = image.shape[-1]
    bins = 256 * channels
    index = tf.cast(_flat(image), tf.int32) + _along(256 * tf.range(channels), image)
    # Not tf.math.bincount, which takes XLA seconds to compile.
    counts = tf.raw_ops.Bincount(arr=tf.reshape(index, [-1]), size=bins, weights=tf.zeros((0,), tf.int32))
    counts = tf.reshape(counts, (channels, 256))
    before = tf.cumsum(counts, axis=1, exclusive=True)
    # Pixels below the brightest value that occurs, shared among 255 steps.
    below = tf.reduce_max(tf.where(counts > 0, before, 0), 1, keepdims=True)  # [C, 1]
    step = below // 255
    table = tf.minimum((step // 2 + before) // tf.maximum(step, 1), 255)
    table = tf.cast(tf.where(step > 0, table, tf.range(256)[None]), tf.uint8)
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
    middle = _whole(smooth + factor * (inner - smooth))
    flat = _flat(image)
    middle = tf.concat([flat[1:-1, :c], middle, flat[1:-1, -c:]], 1)
    return tf.reshape(tf.concat([flat[:1], middle, flat[-1:]], 0), image.shape)


def _taps(fraction: Any, interpolation: str) -> list[Any]:
    """Weights of the pixels -1, 0, 1, 2 around a point `fraction` past pixel 0."""
    tf = tensorflow()
    d = fraction
    if interpolation == "bilinear":
        return [tf.zeros_like(d), 1.0 - d, d, tf.zeros_like(d)]
    # Keys' cubic with a = -1, which Pillow's warps use (its resize has a = -0.5).
    e = 1.0 - d
    return [-d * e * e, 1.0 + d * d * (d - 2.0), 1.0 + e * e * (e - 2.0), -e * d * d]


def _between(image: Any, taps: list[Any], axis: int) -> Any:
    """Points between neighbours: uint8 `[h, w, C]` -> one more along `axis`.

    Point j lies between the pixels j - 1 and j, of which the edge is repeated;
    `taps` weigh the pixels j - 2 .. j + 1 and broadcast against `[h, w C]`.
    """
    tf = tensorflow()
    height, width, c = image.shape
    flat = _float(image)
    if axis:
        flat = tf.concat([flat[:, :c]] * 2 + [flat] + [flat[:, -c:]] * 2, 1)
        size = (width + 1) * c
        mixed = sum(tap * flat[:, i * c : i * c + size] for i, tap in enumerate(taps))
        return tf.reshape(_whole(mixed), (height, width + 1, c))
    flat = tf.concat([flat[:1]] * 2 + [flat] + [flat[-1:]] * 2, 0)
    mixed = sum(tap * flat[i : i + height + 1] for i, tap in enumerate(taps))
    return tf.reshape(_whole(mixed), (height + 1, width, c))


def _edged(points: Any, fraction: Any, axis: int, fill: tuple[int, ...]) -> Any:
    """`_between` with a line of `fill` at either end, which also replaces what lies outside.

    The first point is outside where the fraction is below a half, else the last.
    """
    tf = tensorflow()
    height, width, c = points.shape
    colour = tf.constant(fill, tf.uint8)[None, None]
    shape = (height, 1, c) if axis else (1, width, c)
    line = tf.broadcast_to(colour, shape)
    early = tf.reshape(fraction < 0.5, (-1, 1, 1) if axis else (1, -1, 1))
    if axis:
        first, inner, last = points[:, :1], points[:, 1:-1], points[:, -1:]
    else:
        first, inner, last = points[:1], points[1:-1], points[-1:]
    ends = tf.where(early, line, first), tf.where(early, last, line)
    return tf.concat([line, ends[0], inner, ends[1], line], axis)


def slide_rows(image: Any, offset: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Shifts each row by its own amount: pixel x comes from `x + offset[row]`.

    The fraction first, for which all pixels of a row have the same weights,
    then the whole pixels.

    Args:
      image: uint8 `[h, w, C]`.
      offset: float32 `[h]`, in pixels.
      interpolation: "bicubic" or "bilinear".
      fill: C grey levels for what lies outside.
    """
    tf = tensorflow()
    height, width, c = image.shape
    whole = tf.floor(offset)
    taps = [tap[:, None] for tap in _taps(offset - whole, interpolation)]
    table = _edged(_between(image, taps, 1), offset - whole, 1, fill)  # [h, w + 3, C]
    column = tf.cast(whole, tf.int32)[:, None] + tf.range(2, width + 2)[None]
    index = tf.clip_by_value(column, 0, width + 2) + (width + 3) * tf.range(height)[:, None]
    return tf.gather(tf.reshape(table, (-1, c)), index)


def slide_columns(image: Any, offset: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """`slide_rows` of the columns: pixel y comes from `y + offset[column]`."""
    tf = tensorflow()
    height, width, c = image.shape
    whole = tf.floor(offset)
    taps = [tf.repeat(tap, c)[None] for tap in _taps(offset - whole, interpolation)]  # [1, w C]
    table = _edged(_between(image, taps, 0), offset - whole, 0, fill)  # [h + 3, w, C]
    row = tf.cast(whole, tf.int32)[None] + tf.range(2, height + 2)[:, None]
    index = tf.clip_by_value(row, 0, height + 2) * width + tf.range(width)[None]
    return tf.gather(tf.reshape(table, (-1, c)), index)


def _translate(image: Any, offset: Any, axis: int, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Moves all rows or columns by `offset` pixels, less than there are."""
    tf = tensorflow()
    count = image.shape[axis]
    whole = tf.floor(offset)
    fraction = tf.reshape(offset - whole, (1,))
    table = _between(image, _taps(offset - whole, interpolation), axis)
    table = _edged(table, fraction, axis, fill)  # one line of fill, count + 1 points, one of fill
    line = table[:, :1] if axis else table[:1]
    # More of it after the last and, going round, before the first. No slice from a drawn start: XLA
    # would compile each anew.
    table = tf.concat([table, tf.repeat(line, 2 * count, axis)], axis)
    table = tf.roll(table, -(tf.cast(whole, tf.int32) + 2), axis)
    return table[:, :count] if axis else table[:count]


def shear_x(image: Any, factor: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Slides rows by `factor` pixels per pixel of height."""
    tf = tensorflow()
    offset = factor * (tf.range(image.shape[0], dtype=tf.float32) + 0.5)
    return slide_rows(image, offset, interpolation, fill)


def shear_y(image: Any, factor: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Slides columns by `factor` pixels per pixel of width."""
    tf = tensorflow()
    offset = factor * (tf.range(image.shape[1], dtype=tf.float32) + 0.5)
    return slide_columns(image, offset, interpolation, fill)


def translate_x(image: Any, share: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Moves the picture left by `share` of the width, less than 1 either way."""
    return _translate(image, share * image.shape[1], 1, interpolation, fill)


def translate_y(image: Any, share: Any, interpolation: str, fill: tuple[int, ...]) -> Any:
    """Moves the picture up by `share` of the height, likewise."""
    return _translate(image, share * image.shape[0], 0, interpolation, fill)


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
    return tf.where(known[..., None], _whole(out), tf.constant(fill, tf.uint8))
