"""Contact sheets: groups of images side by side, each with a frame and a caption.

Needs matplotlib (`pip install matplotlib`), imported on first use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dyntoken.analysis.figures import INK, matplotlib, to_rgb

DPI = 100  # pixels of the images fall on pixels of the file
SIDE = 0.90  # inches of a cell, about
LABEL = 1.45
CAPTION, GAP = 0.2, 0.16
RIGHT, WRONG, PLAIN = "#2a8c4a", "#c8324b", "#999999"
LETTERS = 15  # of a caption


@dataclasses.dataclass(frozen=True)
class Cell:
    """One image.

    Attributes:
      image: `[H, W]`, `[H, W, 1]` or `[H, W, 3]`.
      caption: short text below it.
      right: green frame or red one; None for grey.
    """

    image: np.ndarray
    caption: str = ""
    right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Lines of cells under one label; None leaves a place empty."""

    label: str
    lines: Sequence[Sequence[Cell | None]]


def sheet(
    groups: Sequence[Group], *, columns: Sequence[str] = (), title: str, note: str = "", side: float = SIDE
) -> Any:
    """Draws groups of images one below the other.

    Small images are enlarged by a whole factor, pixel by pixel.

    Args:
      groups: of lines of the same length.
      columns: a name above each column, or none.
      title: above everything.
      note: a line below everything, or several.
      side: inches of a cell, about; a file pixel is a hundredth.

    Returns:
      A matplotlib `Figure`; save it with its own dpi.

    Raises:
      ValueError: nothing to draw, or lines of different lengths.
    """
    lines = [line for group in groups for line in group.lines]
    cells = [cell for line in lines for cell in line if cell is not None]
    if not cells:
        raise ValueError("no image to draw")
    width = len(lines[0])
    if any(len(line) != width for line in lines) or len(columns) not in (0, width):
        raise ValueError(
            f"lines of {sorted({len(line) for line in lines})} cells, {len(columns)} column names"
        )
    high, wide = _size(cells[0].image.shape[:2], side)
    step_x, step_y = max(wide, side) + 0.08, high + CAPTION
    top = 0.42 + (0.24 if columns else 0.04)
    height = (
        top
        + len(lines) * step_y
        + (len(groups) - 1) * GAP
        + (0.34 + 0.14 * note.count("\n") if note else 0.1)
    )
    total = LABEL + width * step_x + 0.12
    figure = matplotlib("figure").Figure(figsize=(total, height), dpi=DPI, facecolor="white")
    text = {"color": INK, "transform": figure.dpi_scale_trans}
    figure.text(0.12, height - 0.12, title, fontsize=11, va="top", **text)
    for column, name in enumerate(columns):
        x = LABEL + column * step_x + wide / 2
        figure.text(x, height - top + 0.06, _cut(name), fontsize=8, ha="center", va="bottom", **text)
    y = height - top
    for index, group in enumerate(groups):
        if index:
            rule = matplotlib("lines").Line2D(
                [0.12, total - 0.12], [y - GAP / 2 + 0.02] * 2, color="#cccccc", linewidth=0.8
            )
            rule.set_transform(figure.dpi_scale_trans)
            figure.add_artist(rule)
            y -= GAP
        figure.text(0.12, y - 0.02, group.label, fontsize=9, va="top", linespacing=1.5, **text)
        for line in group.lines:
            for column, cell in enumerate(line):
                if cell is not None:
                    _cell(figure, cell, LABEL + column * step_x, y - high, (wide, high), text)
            y -= step_y
    if note:
        figure.text(0.12, 0.1, note, fontsize=8, va="bottom", **text)
    return figure


def _size(shape: tuple[int, int], side: float) -> tuple[float, float]:
    """(height, width) in inches: a whole number of file pixels per image pixel where one fits."""
    longest = max(shape)
    factor = side * DPI / longest
    factor = float(int(factor)) if factor >= 1 else factor
    return shape[0] * factor / DPI, shape[1] * factor / DPI


def _cell(
    figure: Any, cell: Cell, x: float, y: float, size: tuple[float, float], text: dict[str, Any]
) -> None:
    wide, high = size
    width, height = figure.get_size_inches()
    axis = figure.add_axes((x / width, y / height, wide / width, high / height))
    small = cell.image.shape[0] <= high * DPI
    axis.imshow(to_rgb(cell.image), interpolation="nearest" if small else "antialiased", aspect="auto")
    axis.set_xticks([])
    axis.set_yticks([])
    colour = {True: RIGHT, False: WRONG, None: PLAIN}[cell.right]
    for side in axis.spines.values():
        side.set(color=colour, linewidth=1.8)
    shade = {**text, "color": INK if cell.right is None else colour}
    figure.text(x + wide / 2, y - 0.04, _cut(cell.caption), fontsize=7, ha="center", va="top", **shade)


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"
