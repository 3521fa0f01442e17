"""Strips of photographs: an image, what is left of it after each stage, which patch stands for which, and the scores.

A row per image and model. Where a token stands for several patches, these have the mean colour of their pixels; the
tokens that stand for most have a colour of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dyntoken.analysis import figures
from dyntoken.analysis.token_maps import PAPER, Fate, Palette, fate, outline, pixels
from dyntoken.types import Reduction

SIDE, GAP, LABEL, TOP, CAPTION = 2.0, 0.07, 0.3, 0.3, 0.24  # inches
DPI = 110
STAGES = 3  # panels of what is left: a method with a site in every block would fill a wall
PALE = 0.24  # share of a dropped patch's own colour
VIVID = 6  # tokens with a colour of their own
COLOURS = ("#e6194b", "#ffb000", "#00a6ed", "#7fb800", "#9b5de5", "#ff7f50")
FUSED = "#f27a0d"
HEAT = "inferno"


@dataclasses.dataclass(frozen=True)
class Row:
    """One image under one model.

    Attributes:
      image: `[H, W, 1 or 3]`, uint8 or in [0, 1].
      fates: of its patches, one per site.
      scores: `[sites, N0]`, see `scores_of`.
      stages: what to call each site, `"block 3"`.
      label: on the left, the model's name.
      name: of the image.
      caption: below the image, what the model says of it.
    """

    image: np.ndarray
    fates: Sequence[Fate]
    scores: Sequence[np.ndarray]
    stages: Sequence[str]
    label: str = ""
    name: str = ""
    caption: str = ""

    def drawn(self) -> list[int]:
        """The sites that get a panel: the last, and some before it."""
        count = len(self.fates)
        some = {round(at) for at in np.linspace(0, count - 1, min(count, STAGES))}
        return sorted(some | {count - 1})[-STAGES:]


def row(image: np.ndarray, reductions: Sequence[Reduction], stages: Sequence[str], **words: str) -> Row:
    """The row of the first image that some reductions are of."""
    return Row(image, [fate(reduction) for reduction in reductions], scores_of(reductions), stages, **words)


def scores_of(reductions: Sequence[Reduction], index: int = 0) -> list[np.ndarray]:
    """For each site `[N0]`: the score of the row that stood for a patch ahead of it, NaN where none did."""
    found = []
    before: Reduction | None = None
    for reduction in reductions:
        scores = np.asarray(reduction.scores[index], np.float32)
        rows = np.arange(np.asarray(reduction.carrier[index]).size)
        if before is not None and len(scores) != rows.size and before.carrier is not None:
            rows = np.asarray(before.carrier[index])  # gathered: rows are no longer the patches in order
        at = np.where(rows < len(scores), rows, -1)
        values = np.where(at >= 0, scores[at], np.nan)
        found.append(np.where(np.isfinite(values), values, np.nan))
        before = reduction
    return found


def strip(rows: Sequence[Row], *, title: str = "") -> Any:
    """Draws rows one below the other.

    Returns:
      A matplotlib `Figure`; save it with its own dpi.

    Raises:
      ValueError: nothing to draw.
      ModuleNotFoundError: matplotlib is absent; the message says what to install.
    """
    if not any(row.fates for row in rows):
        raise ValueError("nothing to draw: the model reduces no tokens (choose one with a method)")
    shown = [row.drawn() for row in rows]
    stages = max(map(len, shown))
    columns = 1 + stages + 2
    tall = [SIDE * row.image.shape[0] / row.image.shape[1] for row in rows]
    left = LABEL if any(row.label for row in rows) else GAP
    width = left + columns * (SIDE + GAP)
    height = (TOP if title else GAP) + sum(tall) + len(rows) * (CAPTION + GAP)
    figure = figures.figure(width, height, dpi=DPI, layout="none")

    def text(x: float, y: float, words: str, **style: Any) -> None:
        style = {"color": figures.INK, "fontsize": 8.5, "transform": figure.dpi_scale_trans, **style}
        figure.text(x, y, words, **style)

    if title:
        text(left, height - 0.08, title, va="top", fontsize=10.5)
    y = height - (TOP if title else GAP)
    for row, sites, high in zip(rows, shown, tall, strict=True):
        y -= high

        def panel(column: int, words: str, high: float = high, y: float = y) -> Any:
            x = left + column * (SIDE + GAP)
            text(x + SIDE / 2, y - 0.05, words, va="top", ha="center")
            return figure.add_axes((x / width, y / height, SIDE / width, high / height))

        if row.label:
            text(0.08, y + high / 2, row.label, rotation=90, va="center", fontsize=10)
        rgb = figures.to_rgb(row.image)
        grid = row.fates[0].grid
        _show(panel(0, row.caption or f"{grid[0]} x {grid[1]} = {grid[0] * grid[1]} patches"), rgb, grid)
        for column, site in enumerate(sites, start=1):
            f = row.fates[site]
            besides = f" kept + {f.fused_tokens} fused" if f.fused_tokens else f" of {f.kept.size} kept"
            axis = panel(column, f"{row.stages[site]}: {f.kept.sum()}{besides}")
            _show(axis, left_over(rgb, f), f.grid)
            outline(axis, f.kept, f.grid, "#ffffff", 0.8)
        last = row.fates[-1]
        axis = panel(1 + stages, who(last))
        _groups(axis, rgb, last)
        _heat(panel(2 + stages, f"scores at {row.stages[0]}"), rgb, row.scores[0], row.fates[0].grid)
        y -= CAPTION + GAP
    return figure


def left_over(rgb: np.ndarray, f: Fate) -> np.ndarray:
    """`rgb [H, W, 3]` with the patches that are no tokens any more faded."""
    pale = PALE * rgb + (1 - PALE) * PAPER
    return np.where(pixels(f.kept, f.grid, rgb)[..., None], rgb, pale)


def who(f: Fate) -> str:
    """What the panel of groups shows, in words."""
    if f.absorbed.any():
        most = np.bincount(f.host[f.host >= 0]).max()
        return f"one token: up to {most} patches"
    if f.fused.any():
        return f"{f.fused.sum()} patches in {f.fused_tokens} fused token{'s' * (f.fused_tokens != 1)}"
    return "dropped, without a trace"


def _show(axis: Any, rgb: np.ndarray, grid: tuple[int, int]) -> None:
    figures.picture(
        axis, rgb, extent=(0, grid[1], grid[0], 0), interpolation="antialiased", frame="white", width=0
    )


def means(rgb: np.ndarray, f: Fate) -> np.ndarray:
    """Mean colour `[N0, 3]` of all patches that each patch's token stands for; a patch without one keeps its own."""
    of_cell = cells(rgb, f.grid)
    label = np.where(f.fused, f.host.size, np.where(f.host >= 0, f.host, f.host.size + 1))
    count = np.bincount(label, minlength=f.host.size + 2)
    total = np.stack([np.bincount(label, c, minlength=f.host.size + 2) for c in of_cell.T], axis=1)
    mean = (total / np.maximum(count, 1)[:, None])[label]
    return np.where(f.dropped[:, None], of_cell, mean)


def cells(rgb: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Mean colour of each cell, `[N0, 3]`."""
    y, x = (np.arange(size) * n // size for size, n in zip(rgb.shape[:2], grid, strict=True))
    flat = (y[:, None] * grid[1] + x[None, :]).ravel()
    count = np.bincount(flat, minlength=grid[0] * grid[1])
    return np.stack([np.bincount(flat, c) for c in rgb.reshape(-1, 3).T], axis=1) / count[:, None]


def largest(f: Fate) -> Palette:
    """A colour for each of the hosts that stand for most patches."""
    count = np.bincount(f.host[f.host >= 0], minlength=f.host.size)
    order = np.argsort(-count, kind="stable")[:VIVID]
    rgb = figures.matplotlib("colors").to_rgb
    return {int(host): rgb(colour) for host, colour in zip(order, COLOURS, strict=False) if count[host] > 1}


def _groups(axis: Any, rgb: np.ndarray, f: Fate) -> None:
    """Paints each group in the mean colour of its pixels, the largest ones in a colour of their own."""
    tint, palette = means(rgb, f), largest(f)
    shade = rgb.mean(axis=-1, keepdims=True)
    picture = pixels(tint, f.grid, rgb)
    picture = np.where(pixels(f.dropped, f.grid, rgb)[..., None], PALE * rgb + (1 - PALE) * PAPER, picture)
    for host, colour in palette.items():
        mine = pixels(f.host == host, f.grid, rgb)[..., None]
        picture = np.where(mine, np.asarray(colour) * (0.7 + 0.3 * shade), picture)
    if f.fused.any():
        fused = np.asarray(figures.matplotlib("colors").to_rgb(FUSED))
        picture = np.where(pixels(f.fused, f.grid, rgb)[..., None], fused * (0.7 + 0.3 * shade), picture)
        picture = np.where(pixels(f.kept, f.grid, rgb)[..., None], rgb, picture)
    _show(axis, picture, f.grid)
    outline(axis, np.where(f.fused, -2, f.host), f.grid, "#ffffff", 0.7)
    y, x = np.divmod(np.fromiter(palette, int), f.grid[1])
    size = 260 * (SIDE / max(f.grid)) ** 0.9
    if len(y):
        axis.scatter(x + 0.5, y + 0.5, s=size, c="white", edgecolors=figures.INK, linewidths=0.8, zorder=3)


def _heat(axis: Any, rgb: np.ndarray, scores: np.ndarray, grid: tuple[int, int]) -> None:
    """Scores by rank over the image in grey."""
    _show(axis, heat(rgb, scores, grid), grid)


def heat(rgb: np.ndarray, scores: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """`[H, W, 3]`: the image in grey under the colours of the scores, bright is high; grey where there is none."""
    grey = np.repeat(rgb.mean(axis=-1, keepdims=True), 3, axis=-1)
    known = np.isfinite(scores)
    if not known.any():
        return grey
    colours = figures.matplotlib("cm").ScalarMappable(cmap=HEAT).get_cmap()(level(scores))[:, :3]
    painted = pixels(colours, grid, rgb) * (0.35 + 0.65 * grey)
    return np.where(pixels(known, grid, rgb)[..., None], painted, grey)


def level(scores: np.ndarray) -> np.ndarray:
    """Scores `[N0]` as their rank, 0 the lowest, 1 the highest: what a method decides by."""
    known = np.isfinite(scores)
    ranks = np.zeros(scores.shape, np.float64)
    values = np.unique(scores[known])
    ranks[known] = np.searchsorted(values, scores[known]) / max(len(values) - 1, 1)
    return ranks
