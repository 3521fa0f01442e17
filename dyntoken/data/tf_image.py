"""Decoding, cropping and resizing of encoded images inside tf.data.

The same procedures as `augment` and `resample`, on one image of any size, with
TensorFlow's stateless draws.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from dyntoken.data.augment import TRIES, AugmentOptions
from dyntoken.data.distort import Distortion
from dyntoken.data.tf_import import tensorflow


def _decode(data: Any, channels: int, box: Callable[[Any, Any], Any] | None = None) -> Any:
    """Decodes an image once; of a JPEG only the crop.

    JPEGs may be grey or CMYK, and what is no JPEG (PNG, BMP, GIF under whatever
    name) is recognised by its content.

    Args:
      data: the encoded image.
      channels: 1 or 3.
      box: (height, width) -> int32 `[4]` (top, left, height, width) to keep;
        None keeps all.

    Returns:
      uint8 `[h, w, channels]`.
    """
    tf = tensorflow()
    accurate = "INTEGER_ACCURATE"  # what Pillow decodes with

    def jpeg() -> Any:
        if box is None:
            return tf.image.decode_jpeg(data, channels=channels, dct_method=accurate)
        shape = tf.image.extract_jpeg_shape(data)
        crop = box(shape[0], shape[1])
        return tf.image.decode_and_crop_jpeg(data, crop, channels=channels, dct_method=accurate)

    def other() -> Any:
        image = tf.io.decode_image(data, channels=channels, expand_animations=False)
        if box is None:
            return image
        shape = tf.shape(image)
        top, left, height, width = tf.unstack(box(shape[0], shape[1]))
        return image[top : top + height, left : left + width]

    image = tf.cond(tf.io.is_jpeg(data), jpeg, other)
    return tf.ensure_shape(image, (None, None, channels))


def _stretch(image: Any, size: Any, interpolation: str) -> Any:
    """Resizes the first axis of `[n, m]` to `size`, antialiased; float32 `[size, m]`."""
    tf = tensorflow()
    shape = tf.shape(image)
    out = tf.raw_ops.ScaleAndTranslate(
        images=image[None, :, None],  # one column whose pixels have m channels
        size=tf.stack([size, 1]),
        scale=tf.stack([tf.cast(size, tf.float32) / tf.cast(shape[0], tf.float32), 1.0]),
        translation=(0.0, 0.0),
        kernel_type={"bicubic": "keyscubic", "bilinear": "triangle"}[interpolation],
        antialias=True,
    )
    return tf.reshape(out, tf.stack([size, shape[1]]))


def _resize(image: Any, height: Any, width: Any, interpolation: str) -> Any:
    """uint8 `[h, w, C]` -> uint8 `[height, width, C]`, antialiased as `tf.image.resize`.

    Rows, then columns, each as a matrix: that takes half the time of both at
    once, whose inner loop is over three channels.
    """
    tf = tensorflow()
    shape = tf.shape(image)
    channels = image.shape[-1]
    rows = _stretch(tf.reshape(image, tf.stack([shape[0], -1])), height, interpolation)  # [height, w C]
    rows = tf.reshape(tf.transpose(rows), tf.stack([shape[1], -1]))  # [w, C height]
    both = tf.transpose(_stretch(rows, width, interpolation))  # [C height, width]
    both = tf.cast(tf.clip_by_value(tf.floor(both + 0.5), 0.0, 255.0), tf.uint8)
    both = tf.transpose(tf.reshape(both, (channels, -1)))
    return tf.reshape(both, tf.stack([height, width, channels]))


def random_box(draws: Any, height: Any, width: Any, options: AugmentOptions) -> Any:
    """`augment.random_boxes` for one image.

    Args:
      draws: float32 `[22]` in [0, 1).
      height, width: int32 scalars.

    Returns:
      int32 `[4]` (top, left, height, width).
    """
    tf = tensorflow()
    tall, wide = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    (low, high), (narrow, broad) = options.scale, options.ratio
    area = tall * wide * (low + draws[:TRIES] * (high - low))
    aspect = tf.exp(math.log(narrow) + draws[TRIES : 2 * TRIES] * math.log(broad / narrow))
    w = tf.cast(tf.round(tf.sqrt(area * aspect)), tf.int32)
    h = tf.cast(tf.round(tf.sqrt(area / aspect)), tf.int32)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = tf.argmax(tf.cast(fits, tf.int32))
    w, h = w[first], h[first]
    top = tf.minimum(tf.cast(draws[-2] * tf.cast(height - h + 1, tf.float32), tf.int32), height - h)
    left = tf.minimum(tf.cast(draws[-1] * tf.cast(width - w + 1, tf.float32), tf.int32), width - w)
    most_h = tf.where(wide / tall < narrow, tf.cast(tf.round(wide / narrow), tf.int32), height)
    most_w = tf.where(wide / tall > broad, tf.cast(tf.round(tall * broad), tf.int32), width)
    whole = tf.stack([(height - most_h) // 2, (width - most_w) // 2, most_h, most_w])
    return tf.where(tf.reduce_any(fits), tf.stack([top, left, h, w]), whole)


_DISTORT = 1  # what the seed of the distortion's draws is folded with


def train_image(data: Any, seed: Any, size: tuple[int, int], channels: int, options: AugmentOptions) -> Any:
    """Decodes, crops, resizes and flips one image.

    Args:
      data: the encoded image.
      seed: int64 `[2]`, keys every draw.
      size: (h, w) of the result.

    Returns:
      uint8 `[h, w, channels]`.
    """
    tf = tensorflow()
    draws = tf.random.stateless_uniform((2 * TRIES + 3,), seed)
    if options.crop == "random_resized":
        box = functools.partial(random_box, draws[:-1], options=options)
        image = _resize(_decode(data, channels, box), *size, options.interpolation)
    else:
        image = eval_image(data, size, channels, 1.0, options.interpolation)
    image = tf.where(draws[-1] < options.flip, image[:, ::-1], image)
    return tf.ensure_shape(image, (*size, channels))


def distort_image(image: Any, seed: Any, distortion: Distortion) -> Any:
    """RandAugment or colour jitter of a cropped uint8 image `[h, w, C]`, keyed like `train_image`."""
    tf = tensorflow()
    seed = tf.random.experimental.stateless_fold_in(seed, _DISTORT)
    return distortion(image, tf.random.stateless_uniform((distortion.width,), seed))


@functools.lru_cache(maxsize=16)
def compiled_train(
    size: tuple[int, int], channels: int, options: AugmentOptions
) -> Callable[[Any, Any], Any]:
    """`train_image` of (data, seed) as a graph that every epoch reuses."""
    tf = tensorflow()
    signature = (tf.TensorSpec((), tf.string), tf.TensorSpec((2,), tf.int64))

    @tf.function(input_signature=signature, autograph=False)
    def run(data: Any, seed: Any) -> Any:
        return train_image(data, seed, size, channels, options)

    return run


@functools.lru_cache(maxsize=16)
def compiled_eval(
    size: tuple[int, int], channels: int, crop_pct: float, interpolation: str
) -> Callable[[Any], Any]:
    """`eval_image` of the encoded image, likewise."""
    tf = tensorflow()

    @tf.function(input_signature=(tf.TensorSpec((), tf.string),), autograph=False)
    def run(data: Any) -> Any:
        return eval_image(data, size, channels, crop_pct, interpolation)

    return run


def eval_image(data: Any, size: tuple[int, int], channels: int, crop_pct: float, interpolation: str) -> Any:
    """Decodes one image, resizes it as `resample.covering_size` says, crops the centre.

    Returns:
      uint8 `[h, w, channels]`; an image of the right size comes back unchanged.
    """
    tf = tensorflow()
    image = _decode(data, channels)
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    tall, wide = int(size[0] / crop_pct), int(size[1] / crop_pct)

    def fit() -> Any:
        by_height = tall * width >= wide * height
        new_h = tf.where(by_height, tall, tf.maximum(height * wide // width, size[0]))
        new_w = tf.where(by_height, tf.maximum(width * tall // height, size[1]), wide)
        resized = _resize(image, new_h, new_w, interpolation)
        top = tf.cast(tf.round((new_h - size[0]) / 2), tf.int32)
        left = tf.cast(tf.round((new_w - size[1]) / 2), tf.int32)
        return resized[top : top + size[0], left : left + size[1]]

    untouched = (height == size[0]) & (width == size[1])
    return tf.ensure_shape(tf.cond(untouched, lambda: image, fit), (*size, channels))
