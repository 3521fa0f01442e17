"""Contact sheets: groups of images side by side, each with a frame and a caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dyntoken.analysis import figures

DPI = 100  # pixels of the images fall on pixels of the file
SIDE = 0.90  # inches of a cell, about
LABEL = 1.45
CAPTION, GAP = 0.2, 0.16
FRAMES = {True: "#2a8c4a", False: "#c8324b", None: figures.FRAME}
LETTERS = 15  # of a caption


class Cell(NamedTuple):
    """One image `[H, W]`, `[H, W, 1]` or `[H, W, 3]`, and a short text below it."""

    image: np.ndarray
    caption: str = ""
    right: bool | None = None  # green frame or red one; None for grey


class Group(NamedTuple):
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
    count = len(lines[0])
    if any(len(line) != count for line in lines) or len(columns) not in (0, count):
        sizes = sorted({len(line) for line in lines})
        raise ValueError(f"lines of {sizes} cells, {len(columns)} column names")
    # A whole number of file pixels per image pixel where one fits.
    shape = np.array(cells[0].image.shape[:2])
    factor = side * DPI / shape.max()
    high, wide = shape * (int(factor) if factor >= 1 else factor) / DPI
    step_x, step_y = max(wide, side) + 0.08, high + CAPTION
    top = 0.42 + (0.24 if columns else 0.04)
    bottom = 0.34 + 0.14 * note.count("\n") if note else 0.1
    height = top + len(lines) * step_y + (len(groups) - 1) * GAP + bottom
    width = LABEL + count * step_x + 0.12
    figure = figures.figure(width, height, dpi=DPI, layout="none")

    def text(x: float, y: float, words: str, **style: Any) -> None:
        style = {"color": figures.INK, "va": "top", "transform": figure.dpi_scale_trans, **style}
        figure.text(x, y, words, **style)

    text(0.12, height - 0.12, title, fontsize=11)
    for column, name in enumerate(columns):
        x = LABEL + column * step_x + wide / 2
        text(x, height - top + 0.06, _cut(name), fontsize=8, ha="center", va="bottom")
    y = height - top
    for index, group in enumerate(groups):
        if index:
            rule = [0.12, width - 0.12], [y - GAP / 2 + 0.02] * 2
            line = figures.matplotlib("lines").Line2D(*rule, color="#cccccc", linewidth=0.8)
            line.set_transform(figure.dpi_scale_trans)
            figure.add_artist(line)
            y -= GAP
        text(0.12, y - 0.02, group.label, fontsize=9, linespacing=1.5)
        for line in group.lines:
            for column, cell in enumerate(line):
                if cell is None:
                    continue
                x = LABEL + column * step_x
                axis = figure.add_axes((x / width, (y - high) / height, wide / width, high / height))
                how = "nearest" if cell.image.shape[0] <= high * DPI else "antialiased"
                frame = FRAMES[cell.right]
                figures.picture(axis, cell.image, frame=frame, width=1.8, interpolation=how)
                shade = figures.INK if cell.right is None else frame
                text(x + wide / 2, y - high - 0.04, _cut(cell.caption), fontsize=7, ha="center", color=shade)
            y -= step_y
    if note:
        text(0.12, 0.1, note, fontsize=8, va="bottom")
    return figure


def _cut(words: str) -> str:
    return words if len(words) <= LETTERS else words[: LETTERS - 1] + "…"
