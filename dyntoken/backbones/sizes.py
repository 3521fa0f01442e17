"""Checks of what all backbones are given: image size, channels, width and heads."""

from __future__ import annotations

from typing import Any

import jax

Array = jax.Array


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """`n` or `(rows, columns)` to a pair."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def of_stage(value: Any, stage: int) -> Any:
    """The value for a stage of a field that holds one for all, or one per stage."""
    return value[stage] if isinstance(value, tuple) else value


def check_images(images: Array, img_size: int | tuple[int, int], in_chans: int) -> None:
    """Raises ValueError unless `images` are `[B, *img_size, in_chans]`."""
    size = pair(img_size)
    if images.ndim != 4 or images.shape[1:] != (*size, in_chans):
        raise ValueError(
            f"this model takes images [B, {size[0]}, {size[1]}, {in_chans}], got {images.shape}; "
            "create_model(..., img_size=, in_chans=) builds it for others"
        )


def nearest_multiple(size: tuple[int, int], unit: tuple[int, int]) -> tuple[int, int]:
    """The image size nearest to `size` whose sides are multiples of `unit`."""
    return tuple(max(u, round(s / u) * u) for s, u in zip(size, unit, strict=True))


def check_multiple(img_size: int | tuple[int, int], unit: int | tuple[int, int], problem: str) -> None:
    """Raises ValueError (`img_size {problem}`) unless the sides are multiples of `unit`."""
    size, unit = pair(img_size), pair(unit)
    if any(s % u or s < u for s, u in zip(size, unit, strict=True)):
        near = nearest_multiple(size, unit)
        raise ValueError(f"img_size {size} {problem}; the nearest that fits is {near}")


def check_heads(widths: tuple[int, ...], heads: tuple[int, ...]) -> None:
    """Raises ValueError unless each width is a multiple of its number of heads."""
    for width, count in zip(widths, heads, strict=True):
        if width % count:
            raise ValueError(f"width {width} is not divisible by {count} heads")
