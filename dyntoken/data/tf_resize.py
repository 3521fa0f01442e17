"""Antialiased resizing in TensorFlow, compiled by XLA.

Rows first, then columns, with quarters of a grey level in between. Both passes are
sums of weighted rows, of which a processor adds many pixels at a time: the columns
are rows of the transposed image, whose channels travel in one int32, 10 bits for
each, so that there is a third as much to transpose. That takes half the time
of TensorFlow's own resizing.

XLA compiles a program for each shape and for each number of rows in a sum. So
images are cut to windows of few shapes (`_SIDES`), and sums have one of a few
lengths (`_TERMS`), the last of which repeats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dyntoken.data.resample import SUPPORT, kernel
from dyntoken.data.tf_import import graph, optimization_barrier, tf

_BITS, _LEVEL = 10, 4.0  # of a channel between the passes, and its steps per grey level
_TERMS = (5, 8, 11)  # bicubic: enough up to 1, 1.75 and 2.5 pixels per pixel of the result
# Of a window, in sides of the result; the last ones are for huge images and tiny results.
_SIDES = tuple(2.0**n for n in range(-2, 19))
_FINE_SIDES = tuple(sorted({*_SIDES, *(1.5 * side for side in _SIDES if side >= 1)}))


class Window(NamedTuple):
    """A part of a resized image: where it lies and what makes it.

    Attributes:
      start, extent: int32 `[3]`, corner and sides of the window of the image; -1
        for all channels.
      programs: which sums, int32 scalars for rows and for columns.
      where: for rows and for columns, float32 `[4]`: first pixel of the box in the
        window, its extent, pixels per pixel of the result, pixel of the resized
        box to begin with.
    """

    start: Any
    extent: Any
    programs: tuple[Any, Any]
    where: tuple[Any, Any]


def plan_windows(
    boxes: Any, shape: Any, size: tuple[int, int], interpolation: str, scale: Any = None, first: Any = None
) -> list[Window]:
    """Prepares `resize` of n parts of an image.

    Args:
      boxes: int32 `[n, 4]` (top, left, height, width): what of the image is
        resized; pixels outside have no influence.
      shape: int32 `[2]`, height and width of the image.
      size: (height, width) of a part.
      scale: float32 `[2]`, pixels of the image per pixel of the result; None fits
        each box to `size`.
      first: float32 `[2]`, row and column of the resized box where the part
        begins; None is 0.
    """
    corner, sides = boxes[:, :2], tf.cast(boxes[:, 2:], tf.float32)  # [n, 2]
    scale = sides / tf.constant(size, tf.float32) if scale is None else scale + tf.zeros_like(sides)
    first = tf.zeros_like(sides) if first is None else first + tf.zeros_like(sides)
    window = tf.stack([_window(boxes[:, 2 + axis], size[axis], axis) for axis in range(2)], 1)
    start = tf.minimum(corner, tf.maximum(shape[None] - window, 0))
    program = tf.cast(_needed(scale, interpolation)[..., None] > tf.constant(_TERMS), tf.int32)
    where = tf.stack([tf.cast(corner - start, tf.float32), sides, scale, first], 2)
    parts = (
        tf.pad(start, [[0, 0], [0, 1]]),
        tf.pad(window, [[0, 0], [0, 1]], constant_values=-1),
        tf.reduce_sum(program, -1),
        where,
    )
    return [
        Window(start, extent, tuple(tf.unstack(programs)), tuple(tf.unstack(where)))
        for start, extent, programs, where in zip(*(tf.unstack(x) for x in parts), strict=True)
    ]


def _window(extent: Any, size: int, axis: int) -> Any:
    """Side of the window, `[n]`, for boxes of an extent.

    All columns of a window are computed, of its rows only those that count.
    """
    sides = [max(8, min(round(size * side), 2**30)) for side in (_SIDES, _FINE_SIDES)[axis]]
    sides = tf.constant(sides, tf.int32)
    return tf.reduce_min(tf.where(sides[None] >= extent[:, None], sides[None], 2**30), 1)


def _needed(scale: Any, interpolation: str) -> Any:
    """Terms of a sum."""
    return tf.cast(tf.math.ceil(2.0 * SUPPORT[interpolation] * tf.maximum(scale, 1.0)), tf.int32) + 1


def pad_to_windows(image: Any, windows: Sequence[Window]) -> Any:
    """The image, with black below and to the right as far as the windows reach."""
    shape, channels = tf.shape(image), image.shape[-1]
    need = tf.reduce_max(tf.stack([window.extent for window in windows]), 0)[:2]

    def grow() -> Any:  # by concatenation, which copies whole rows; tf.pad goes pixel by pixel
        missing = tf.maximum(need - shape[:2], 0)
        beside = tf.zeros(tf.stack([shape[0], missing[1], channels]), tf.uint8)
        below = tf.zeros(tf.stack([missing[0], shape[1] + missing[1], channels]), tf.uint8)
        return tf.concat([tf.concat([image, beside], 1), below], 0)

    return tf.cond(tf.reduce_any(need > shape[:2]), grow, lambda: image)


def resize(image: Any, window: Window, size: tuple[int, int], interpolation: str, flip: Any = False) -> Any:
    """One part of a resized image, uint8 `[height, width, C]`, mirrored or not.

    The image is of `pad_to_windows`, uint8 `[h, w, C]`, C up to 3, the window of
    `plan_windows` with the same size and interpolation.
    """
    return _resizer(size, image.shape[-1], interpolation)(image, *tf.nest.flatten(window), flip)


@functools.lru_cache(maxsize=64)
def _resizer(size: tuple[int, int], channels: int, interpolation: str) -> Callable[..., Any]:
    """`resize` as a graph that all parts share."""
    terms = (*_TERMS, 0)
    rows = [_rows(size[0], channels, interpolation, n) for n in terms]
    columns = [_columns(size, channels, interpolation, n) for n in terms]

    def run(
        image: Any, start: Any, extent: Any, row: Any, column: Any, down: Any, across: Any, flip: Any
    ) -> Any:
        image = tf.ensure_shape(tf.slice(image, start, extent), (None, None, channels))
        turned = tf.switch_case(row, [functools.partial(op, image, down) for op in rows])
        turned = tf.ensure_shape(turned, (None, size[0]))
        made = tf.switch_case(column, [functools.partial(op, turned, across, flip) for op in columns])
        return tf.ensure_shape(made, (*size, channels))

    window = *[("int32", (3,))] * 2, *[("int32", ())] * 2, *[("float32", (4,))] * 2
    return graph(run, ("uint8", (None, None, channels)), *window, ("bool", ()), xla=False)


def _weighted(
    lines: Any, where: Any, count: int, interpolation: str, terms: int, read: Callable[[Any], list[Any]]
) -> list[Any]:
    """`count` sums of weighted rows of `lines [n, m]`, `terms` in each, 0 for as many as it takes.

    Args:
      where: float32 `[4]`, of `Window`.
      read: `[count, m]` of `lines` -> float32 planes `[count, m]`.

    Returns:
      A float32 `[count, m]` per plane, grey levels in 0..255 with their fraction.
    """
    low, extent, scale, first = tf.unstack(where)
    wide = tf.maximum(scale, 1.0)
    centre = low + (first + tf.range(count, dtype=tf.float32) + 0.5) * scale
    start = tf.floor(centre - SUPPORT[interpolation] * wide)

    def add(done: Any, number: int, total: Any, planes: list[Any]) -> tuple[Any, list[Any]]:
        """The terms `done` to `done + number`."""
        at = start[None] + (tf.cast(done, tf.float32) + tf.range(number, dtype=tf.float32))[:, None]
        inside = tf.cast((at >= low) & (at < low + extent), tf.float32)
        weights = kernel((at + 0.5 - centre) / wide, interpolation, tf) * inside  # [number, count]
        index = tf.clip_by_value(tf.cast(at, tf.int32), 0, tf.shape(lines)[0] - 1)
        for weight, chosen in zip(tf.unstack(weights), tf.unstack(index), strict=True):
            more = [weight[:, None] * plane for plane in read(tf.gather(lines, chosen))]
            planes = [a + b for a, b in zip(planes, more, strict=True)] if planes else more
        return total + tf.reduce_sum(weights, 0), planes

    step = terms or _TERMS[-1]
    total, planes = add(0, step, 0.0, [])
    if not terms:
        needed = _needed(scale, interpolation)

        def body(done: Any, total: Any, *planes: Any) -> tuple[Any, ...]:
            total, added = add(done, step, total, list(planes))
            return (done + step, total, *added)

        _, total, *planes = tf.while_loop(lambda done, *_: done < needed, body, (step, total, *planes))
    return [tf.minimum(tf.maximum(plane / total[:, None], 0.0), 255.0) for plane in planes]


@functools.lru_cache(maxsize=64)
def _rows(height: int, channels: int, interpolation: str, terms: int) -> Callable[..., Any]:
    """(uint8 `[H, W, C]`, where) -> int32 `[W, height]`, `_BITS` for each channel of a pixel."""

    def run(image: Any, where: Any) -> Any:
        shape = tf.shape(image)
        lines = tf.reshape(image, tf.stack([shape[0], shape[1] * channels]))
        (rows,) = _weighted(lines, where, height, interpolation, terms, lambda x: [tf.cast(x, tf.float32)])
        rows = optimization_barrier(tf.cast(rows * _LEVEL + 0.5, tf.int16), where)
        pixels = tf.cast(tf.reshape(rows, tf.stack([height, shape[1], channels])), tf.int32)
        return tf.transpose(sum(pixels[..., c] * (1 << _BITS * c) for c in range(channels)))

    return graph(run, ("uint8", (None, None, channels)), ("float32", (4,)))


@functools.lru_cache(maxsize=64)
def _columns(size: tuple[int, int], channels: int, interpolation: str, terms: int) -> Callable[..., Any]:
    """(int32 `[W, height]` of `_rows`, where, flip) -> uint8 `[height, width, C]`."""
    height, width = size

    def read(packed: Any) -> list[Any]:
        shifted = (tf.bitwise.right_shift(packed, _BITS * c) for c in range(channels))
        levels = (tf.cast(tf.bitwise.bitwise_and(x, (1 << _BITS) - 1), tf.float32) for x in shifted)
        return [level * (1.0 / _LEVEL) for level in levels]

    def run(columns: Any, where: Any, flip: Any) -> Any:
        planes = _weighted(columns, where, width, interpolation, terms, read)
        packed = sum(tf.cast(plane + 0.5, tf.int32) * (1 << 8 * c) for c, plane in enumerate(planes))
        packed = tf.cond(flip, lambda: packed[::-1], lambda: packed)
        return tf.bitcast(tf.transpose(packed), tf.uint8)[..., :channels]

    return graph(run, ("int32", (None, height)), ("float32", (4,)), ("bool", ()))
