"""Whether pictures are in colour where a model takes grey ones, or the other way round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

THUMBNAIL = (32, 32)
LOOKED_AT = 50  # pictures: a hint need not read a whole set
SPREAD = 24  # of 255, between the channels of the most colourful pixel: less is a scanner's tint


def remark(paths: Sequence[str], channels: int) -> str | None:
    """One line about files whose colours are not what a model of so many channels was trained on.

    None where all are, where pillow is absent, or for files that it cannot read.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError:
        return None
    paths = paths[:LOOKED_AT]
    odd = [path for path in paths if _coloured(Image, path) is (channels == 1)]
    if not odd:
        return None
    names = ", ".join(odd[:3]) + (", ..." if len(odd) > 3 else "")
    what, trained = ("in colour", "grey") if channels == 1 else ("grey", "colour")
    seen = f"{len(odd)} of {len(paths)} pictures looked at are {what} ({names})"
    if len(paths) == 1:
        seen = f"{names} is {what}"
    return f"{seen}, the model was trained on {trained} ones"


def _coloured(image_module, path: str) -> bool | None:
    """Whether a picture shows colours; None if it does not decode."""
    try:
        with image_module.open(path) as image:
            image.draft("RGB", THUMBNAIL)  # JPEGs decode at an eighth of their size
            pixels = np.asarray(image.convert("RGB").resize(THUMBNAIL), np.int32)
    except Exception:  # pillow raises whatever its decoders raise; the caller decodes again, and says so
        return None
    return bool((pixels.max(-1) - pixels.min(-1)).max() > SPREAD)
