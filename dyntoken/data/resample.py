"""Antialiased resizing of uint8 images in numpy, as Pillow's `resize` does it.

Each output pixel is a weighted mean of the input pixels under a kernel that
widens with the reduction; columns first, then rows, rounded to 8 bits after
each pass. The two passes are batched matrix products, so a box and a flip may
differ from image to image.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dyntoken.data.decode import check_shape
from dyntoken.data.errors import DataError
from dyntoken.registry import suggest

_CHUNK = 32  # images per matrix product: bounds the float32 copies in memory


SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # pixels on either side where nothing is reduced


def check_interpolation(name: str) -> None:
    """Raises `DataError` for a kernel that does not exist."""
    if name not in SUPPORT:
        raise DataError(f"unknown interpolation {name!r}: {suggest(name, SUPPORT)}")


def kernel(x: Any, interpolation: str, xp: Any = np) -> Any:
    """Weight at a distance, in numpy or TensorFlow; bicubic is Keys' cubic with a = -0.5."""
    x = xp.abs(x)
    if interpolation == "bilinear":
        return xp.maximum(1.0 - x, 0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return xp.where(x < 1.0, near, xp.where(x < 2.0, far, xp.zeros_like(x)))


def weights(
    start: np.ndarray,
    length: np.ndarray,
    source: int,
    target: int,
    interpolation: str,
    part: slice = slice(None),
) -> np.ndarray:
    """Resampling matrices along one axis, from `source` to `target` pixels, of which some `part` is wanted.

    Args:
      start, length: `[n]` first pixel and extent of each crop.

    Returns:
      float32 `[n, target, source]` (of a part, its rows), rows sum to 1, zero outside the crop.
    """
    length = np.asarray(length, np.float32)[:, None]
    scale = length / np.float32(target)  # [n, 1]
    centre = (np.arange(target, dtype=np.float32)[None, part] + np.float32(0.5)) * scale  # [n, target]
    pixel = np.arange(source, dtype=np.float32)[None] - np.asarray(start, np.float32)[:, None]  # [n, source]
    inside = (pixel >= 0) & (pixel < length)
    distance = pixel[:, None, :] + np.float32(0.5) - centre[:, :, None]
    matrix = kernel(distance / np.maximum(scale, np.float32(1.0))[:, :, None], interpolation)
    matrix *= inside[:, None, :]
    matrix /= matrix.sum(-1, keepdims=True)
    return matrix


def _round(x: np.ndarray) -> np.ndarray:
    x += np.float32(0.5)
    np.floor(x, out=x)
    return np.clip(x, 0.0, 255.0, out=x)


def _apply(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`[n, H, W, C]` by `[n or 1, h, H]` and `[n or 1, w, W]` -> `[n, h, w, C]`."""
    # C order, else the products below miss BLAS and take a hundred times as long.
    planes = images.transpose(0, 3, 1, 2).astype(np.float32, order="C")  # [n, C, H, W]
    planes = _round(planes @ columns.transpose(0, 2, 1)[:, None])  # [n, C, H, w]
    planes = _round(rows[:, None] @ planes)  # [n, C, h, w]
    return planes.transpose(0, 2, 3, 1).astype(np.uint8)


def resize_boxes(
    images: np.ndarray,
    boxes: np.ndarray,
    size: tuple[int, int],
    interpolation: str,
    flip: np.ndarray | None = None,
) -> np.ndarray:
    """Crops a box of each image and resizes it: uint8 `[n, H, W, C]` -> `[n, h, w, C]`.

    Args:
      boxes: `[n, 4]` whole numbers (top, left, height, width) inside the image.
      flip: `[n]` bool, mirror left and right.
    """
    height, width = images.shape[1:3]
    out = []
    for at in range(0, len(images), _CHUNK):
        top, left, tall, wide = boxes[at : at + _CHUNK].T
        rows = weights(top, tall, height, size[0], interpolation)
        columns = weights(left, wide, width, size[1], interpolation)
        if flip is not None:
            mirrored = flip[at : at + _CHUNK]
            columns[mirrored] = columns[mirrored, ::-1]
        out.append(_apply(images[at : at + _CHUNK], rows, columns))
    return np.concatenate(out)


def covering_size(
    height: Any, width: Any, size: tuple[int, int], crop_pct: float, xp: Any = np
) -> tuple[Any, Any]:
    """The size an image is resized to before the centre crop, in numpy or TensorFlow.

    The aspect ratio stays; for a square `size` the shorter side becomes
    `int(size / crop_pct)`, as in timm and torchvision.
    """
    tall, wide = int(size[0] / crop_pct), int(size[1] / crop_pct)
    by_height = tall * width >= wide * height
    return (
        xp.where(by_height, tall, xp.maximum(height * wide // width, size[0])),
        xp.where(by_height, xp.maximum(width * tall // height, size[1]), wide),
    )


def _resized(
    height: int, width: int, size: tuple[int, int], crop_pct: float, squash: bool
) -> tuple[int, int]:
    """What `resize_centre` resizes to before it crops."""
    if squash:
        return int(size[0] / crop_pct), int(size[1] / crop_pct)
    return tuple(map(int, covering_size(height, width, size, crop_pct)))


def resize_centre(
    images: np.ndarray,
    size: tuple[int, int],
    crop_pct: float,
    interpolation: str,
    *,
    squash: bool = False,
) -> np.ndarray:
    """Evaluation's resize and centre crop: uint8 `[n, H, W, C]` -> `[n, h, w, C]`.

    Only what the crop shows is computed, however long the resized side is; `squash`
    stretches the whole image to `size / crop_pct`, whatever its aspect ratio.
    """
    height, width = images.shape[1:3]
    check_shape(height, width)
    tall, wide = _resized(height, width, size, crop_pct, squash)
    top, left = round((tall - size[0]) / 2), round((wide - size[1]) / 2)
    whole = np.zeros(1, np.int64)
    shown = slice(top, top + size[0]), slice(left, left + size[1])
    rows = weights(whole, whole + height, height, tall, interpolation, shown[0])
    columns = weights(whole, whole + width, width, wide, interpolation, shown[1])
    chunks = range(0, len(images), _CHUNK)
    return np.concatenate([_apply(images[at : at + _CHUNK], rows, columns) for at in chunks])


def resize_centre_one(
    image: np.ndarray, size: tuple[int, int], crop_pct: float, interpolation: str, *, squash: bool = False
) -> np.ndarray:
    """`resize_centre` of one image `[H, W, C]`, by Pillow where it is installed.

    It keeps to one core, and leaves the others to more pictures: the matrix products do not. Where its
    fixed point rounds otherwise it is 1 grey level apart, seldom 2: of photographs in some ten of a million pixels,
    in many more where the scale is a simple ratio and halves are to be rounded.
    """
    height, width, channels = image.shape
    try:
        from PIL import Image
    except ImportError:
        channels = 0
    if channels not in (1, 3):
        return resize_centre(image[None], size, crop_pct, interpolation, squash=squash)[0]
    check_shape(height, width)
    tall, wide = _resized(height, width, size, crop_pct, squash)
    top, left = round((tall - size[0]) / 2), round((wide - size[1]) / 2)
    down, across = height / tall, width / wide
    picture, how = Image.fromarray(image if channels == 3 else image[..., 0]), interpolation.upper()
    # Columns, then rows, as above: in one call Pillow 13 orders them by the sizes, and the order shows.
    reach = math.ceil(SUPPORT[interpolation] * max(down, 1.0)) + 1
    first, last = int(top * down) - reach, math.ceil((top + size[0]) * down) + reach
    first, last = max(first, 0), min(last, height)
    picture = picture.crop((0, first, width, last))
    columns, rows = (left * across, (left + size[1]) * across), (top * down, (top + size[0]) * down)
    box = columns[0], 0, columns[1], last - first
    picture = picture.resize((size[1], last - first), Image.Resampling[how], box)
    made = picture.resize(size[::-1], Image.Resampling[how], (0, rows[0] - first, size[1], rows[1] - first))
    return np.asarray(made).reshape(*size, channels)
