"""Decoding, cropping and resizing of encoded images inside tf.data.

The same procedures as `augment` and `resample`, on one image of any size, with
TensorFlow's stateless draws.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from dyntoken.data.augment import TRIES, AugmentOptions, random_boxes
from dyntoken.data.decode import MAX_ASPECT, MAX_PIXELS
from dyntoken.data.decode import decode as pillow_decode
from dyntoken.data.errors import DataError
from dyntoken.data.randaugment import Distortion
from dyntoken.data.resample import covering_size
from dyntoken.data.tf_import import graph, tf
from dyntoken.data.tf_resize import Window, pad_to_windows, plan_windows, resize

_DISTORT = 1  # what the seed of the distortion's draws is folded with


def _bounded(height: Any, width: Any) -> Any:
    """Fails where `decode.check_shape` does."""
    height, width = tf.cast(height, tf.int64), tf.cast(width, tf.int64)
    low, high = tf.minimum(height, width), tf.maximum(height, width)
    fine = (low > 0) & (height * width <= MAX_PIXELS) & (high <= MAX_ASPECT * low)
    return tf.debugging.Assert(fine, ["image of", height, width])


def _decode(data: Any, channels: int, box: Callable[[Any, Any], Any] | None = None) -> Any:
    """`decode.decode` in a graph; of a JPEG only the crop.

    The format is recognised by the content. JPEGs (grey or RGB) and PNGs are decoded
    by TensorFlow, all else by Pillow: TensorFlow takes the palette of a BMP for grey
    levels, turns CMYK differently and knows no TIFF.

    Args:
      box: (height, width) -> int32 `[4]` (top, left, height, width) to keep;
        None keeps all.

    Returns:
      uint8 `[h, w, channels]`, 1 or 3 channels.
    """
    accurate = "INTEGER_ACCURATE"  # what Pillow decodes with

    def part(image: Any) -> Any:
        if box is None:
            return image
        shape = tf.shape(image)
        top, left, height, width = tf.unstack(box(shape[0], shape[1]))
        return image[top : top + height, left : left + width]

    def jpeg() -> Any:
        shape = tf.image.extract_jpeg_shape(data)
        with tf.control_dependencies([_bounded(shape[0], shape[1])]):
            shape = tf.identity(shape)

        def plain() -> Any:
            if box is None:
                with tf.control_dependencies([shape]):
                    return tf.image.decode_jpeg(data, channels=channels, dct_method=accurate)
            top, left, height, width = tf.unstack(box(shape[0], shape[1]))
            # One column more on either side: subsampled colours of the outermost come without their neighbours.
            near, far = tf.maximum(left - 1, 0), tf.minimum(left + width + 1, shape[1])
            window = tf.stack([top, near, height, far - near])
            image = tf.image.decode_and_crop_jpeg(data, window, channels=channels, dct_method=accurate)
            return image[:, left - near : left - near + width]

        return tf.cond(shape[2] == 4, other, plain)

    def png() -> Any:
        width, height = tf.unstack(tf.io.decode_raw(tf.strings.substr(data, 16, 8), tf.int32, False), 2)
        with tf.control_dependencies([_bounded(height, width)]):
            if channels == 3:
                return part(tf.io.decode_png(data, channels=3))
            image = tf.io.decode_png(data)
        return part(tf.cond(tf.shape(image)[2] < 3, lambda: image[..., :1], lambda: _luma(image)))

    def other() -> Any:
        image = tf.numpy_function(_pillow, [data, channels], tf.uint8, stateful=False)
        image = tf.ensure_shape(image, (None, None, channels))
        shape = tf.shape(image)
        with tf.control_dependencies([_bounded(shape[0], shape[1])]):
            return part(tf.identity(image))

    is_png = tf.strings.substr(data, 0, 8) == b"\x89PNG\r\n\x1a\n"
    image = tf.cond(tf.io.is_jpeg(data), jpeg, lambda: tf.cond(is_png, png, other))
    return tf.ensure_shape(image, (None, None, channels))


def _pillow(data: bytes, channels: int) -> np.ndarray:
    """No pixels if it does not decode: TensorFlow would log the traceback of an error."""
    try:
        return pillow_decode(data, int(channels))
    except DataError:
        return np.zeros((0, 0, channels), np.uint8)


def _luma(image: Any) -> Any:
    """uint8 `[h, w, 3 or 4]` to `[h, w, 1]`, with Pillow's integers."""
    red, green, blue = (tf.cast(image[..., c : c + 1], tf.int32) for c in range(3))
    return tf.cast(tf.bitwise.right_shift(19595 * red + 38470 * green + 7471 * blue + 0x8000, 16), tf.uint8)


def _load(data: Any, channels: int, box: Any, guarded: bool) -> tuple[Any, Any]:
    """(image, did it fail); `data` is the encoded image or gives it.

    Unguarded, an image that does not decode raises. Guarded, also against errors of
    reading it, it becomes a black pixel: nothing but tf.data can catch an error inside
    the graph, and setting a data set up for each image takes longer than decoding it
    (see `stream`).
    """

    @tf.autograph.experimental.do_not_convert
    def image(_: Any = None) -> tuple[Any, Any]:
        return _decode(data() if callable(data) else data, channels, box), tf.constant(False)

    if not guarded:
        return image()
    black = tf.data.Dataset.from_tensors((tf.zeros((1, 1, channels), tf.uint8), True))
    made = tf.data.Dataset.from_tensors(0).map(image).ignore_errors()
    pixels, bad = made.concatenate(black).take(1).get_single_element()
    return tf.ensure_shape(pixels, (None, None, channels)), bad


def random_box(draws: Any, height: Any, width: Any, options: AugmentOptions) -> Any:
    """`augment.random_boxes`: float32 `[..., 22]`, int32 scalars -> int32 `[..., 4]`."""
    height, width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    return tf.cast(random_boxes(draws, height, width, options.scale, options.ratio, tf), tf.int32)


def _whole(shape: Any) -> Any:
    """int32 `[1, 4]`, the box of all of an image of shape `[2]`."""
    return tf.concat([tf.zeros_like(shape), shape], 0)[None]


def train_views(
    data: Any,
    seed: Any,
    size: tuple[int, int],
    channels: int,
    options: AugmentOptions,
    distortion: Distortion | None = None,
    guarded: bool = False,
) -> tuple[Any, Any]:
    """Decodes one image, then crops, resizes, flips and distorts it once per view.

    A single view decodes its crop only; several share the whole image. `data` and
    `guarded` are `_load`'s, the seed int64 `[2]` keys every draw.

    Returns:
      (uint8 `[options.repeats, h, w, channels]`, bool: it did not decode).
    """
    views, cropped = options.repeats, options.crop == "random_resized"
    draws = tf.random.stateless_uniform((views, 2 * TRIES + 3), seed)
    places, flips = draws[:, : 2 * TRIES + 2], tf.unstack(draws[:, 2 * TRIES + 2] < options.flip)
    early = cropped and views == 1
    crop = (lambda *shape: random_box(places[0], *shape, options)) if early else None
    image, bad = _load(data, channels, crop, guarded)
    if cropped:
        windows = _crops(size, options, early)(places, tf.shape(image)[:2])
        image = pad_to_windows(image, windows)
    if distortion:
        seed = tf.random.experimental.stateless_fold_in(seed, _DISTORT)
        ops = distortion.sample_ops(tf.random.stateless_uniform((views, distortion.width), seed))
    made: list[Any] = []
    for view in range(views):
        # One view after the other: else TensorFlow's threads take the work from each other.
        with tf.control_dependencies(made[-1:]):
            piece = tf.identity(image)
        if cropped:
            piece = resize(piece, windows[view], size, options.interpolation, flips[view])
        else:
            piece = _centre(piece, size, 1.0, options.interpolation)
            piece = tf.cond(
                flips[view], lambda piece=piece: tf.reverse(piece, [1]), lambda piece=piece: piece
            )
        piece = tf.ensure_shape(piece, (*size, channels))
        made.append(distortion.apply(piece, ops[view]) if distortion else piece)
    return tf.stack(made), bad


@functools.lru_cache(maxsize=16)
def _crops(size: tuple[int, int], options: AugmentOptions, cut: bool) -> Callable[[Any, Any], list[Window]]:
    """(draws of `random_box` `[n, 22]`, shape) -> the windows, by XLA: one node in place of two hundred.

    Args:
      cut: the image is the crop.
    """

    def run(draws: Any, shape: Any) -> list[Window]:
        boxes = _whole(shape) if cut else random_box(draws, shape[0], shape[1], options)
        return plan_windows(boxes, shape, size, options.interpolation)

    return graph(run, ("float32", (options.repeats, 2 * TRIES + 2)), ("int32", (2,)))


def eval_view(
    data: Any,
    size: tuple[int, int],
    channels: int,
    crop_pct: float,
    interpolation: str,
    guarded: bool = False,
) -> tuple[Any, Any]:
    """Decodes one image, resizes it as `resample.covering_size` says, crops the centre.

    Returns:
      (uint8 `[h, w, channels]`, bool: it did not decode); an image of the right size is unchanged.
    """
    image, bad = _load(data, channels, None, guarded)
    image = _centre(image, size, crop_pct, interpolation)
    return tf.ensure_shape(image, (*size, channels)), bad


@functools.lru_cache(maxsize=32)
def compiled(view: Callable[..., Any], load: Callable[[Any], Any], *args: Any) -> Callable[..., Any]:
    """`train_views` of (pointer, seed) or `eval_view` of a pointer, as a graph that every epoch reuses.

    `load(pointer)` gives the encoded image; `args` are the view's, behind data and seed.
    """

    def run(pointer: Any, *seed: Any) -> tuple[Any, Any]:
        return view(lambda: load(pointer), *seed, *args)

    seed = [("int64", (2,))] if view is train_views else []
    return graph(run, ("string", ()), *seed, xla=False)


def _centre(image: Any, size: tuple[int, int], crop_pct: float, interpolation: str) -> Any:
    shape = tf.shape(image)[:2]
    height, width = shape[0], shape[1]

    def fit() -> Any:
        tall, wide = covering_size(height, width, size, crop_pct, tf)
        scale = tf.cast(tf.stack([height / tall, width / wide]), tf.float32)
        first = tf.stack([tf.round((tall - size[0]) / 2), tf.round((wide - size[1]) / 2)])
        windows = plan_windows(_whole(shape), shape, size, interpolation, scale, tf.cast(first, tf.float32))
        return resize(pad_to_windows(image, windows), windows[0], size, interpolation)

    untouched = (height == size[0]) & (width == size[1])
    return tf.cond(untouched, lambda: image, fit)
