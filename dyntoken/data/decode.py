"""One decoder: the pixels of an encoded image, in training, evaluation and pictures.

`decode` reads with Pillow. Inside tf.data, JPEGs and PNGs go through TensorFlow, which
gives the same pixels faster (`tf_image`); all other formats come here there, too.
"""

from __future__ import annotations

import io
import os
import warnings
from typing import Any

import numpy as np

from dyntoken.data.errors import DataError, MissingDataError

# By name, in lower case; what a file really holds is told by its content.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".tga"),
)
MAX_PIXELS = 178_956_970  # above, Pillow takes an image for a decompression bomb
MAX_ASPECT = 256  # longer over shorter side; what resizing makes of the longer one is bounded by it


def check_shape(height: int, width: int) -> None:
    """Raises `DataError` for an image whose decoding or resizing would ask for too much memory."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise DataError(f"{height} x {width} pixels: at most {MAX_PIXELS:,} in all are decoded")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise DataError(f"{height} x {width} pixels: one side is over {MAX_ASPECT} times the other, crop it")


def decode(content: bytes, channels: int) -> np.ndarray:
    """uint8 `[H, W, channels]`, of an animation the first picture, without alpha.

    Of 16 bits the upper eight count; orientation tags are not followed.

    Raises:
      DataError: it does not decode, is too large, or has pixels of no stated range.
      MissingDataError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingDataError("reading pictures needs pillow: pip install pillow") from None
    try:
        with Image.open(io.BytesIO(content)) as image:
            check_shape(image.height, image.width)
            if channels == 1 and image.format in ("JPEG", "MPO"):
                image.draft("L", image.size)  # the stored luma, as TensorFlow takes it
            return _pixels(image, channels)
    except DataError:
        raise
    except Exception as error:  # whatever a plugin of Pillow stumbles over
        unknown = type(error).__name__ == "UnidentifiedImageError"
        text = "not a picture that pillow can read" if unknown else " ".join(str(error).split())
        raise DataError(text or type(error).__name__) from None


def _pixels(image: Any, channels: int) -> np.ndarray:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)[..., None]
        return np.repeat(grey, channels, axis=2)
    if image.mode in ("I", "F"):
        raise DataError(
            f"{image.format} with 32-bit pixels, whose range nothing states: store it with 8 or 16 bits"
        )
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return pixels if channels == 3 else pixels[..., None]


def read_image(path: str | os.PathLike, channels: int) -> np.ndarray:
    """`decode` of a file, which a `DataError` names, for programs that look at single pictures."""
    from etils import epath

    content = epath.Path(path).read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Image size", category=Warning)  # `check_shape` decides
            return decode(content, channels)
    except MissingDataError:
        raise
    except DataError as error:
        raise DataError(f"{os.fspath(path)}: {error}") from None
