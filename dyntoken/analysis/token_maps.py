"""Pictures of what a model kept, dropped, squeezed and fused.

Everything is read from `Output.reductions`: `carrier` says for each original
patch which row stands for it now, `place` where that row lies on the first grid.
"""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dyntoken.analysis import figures
from dyntoken.analysis.figures import INK
from dyntoken.types import Reduction

PANEL = 2.6  # inches
PAPER = 0.93  # grey level that dropped patches fade to
FADE = 0.82
FUSED_COLOUR = (0.95, 0.45, 0.05)
Palette = dict[int, tuple[float, float, float]]


@dataclasses.dataclass(frozen=True)
class Fate:
    """What has become of each original patch of one image after a site.

    Attributes:
      kept: `[N0]` bool, patches that still travel as their own row.
      host: `[N0]` cell of the row that carries a patch, -1 if none does or if
        it is a fused row.
      fused: `[N0]` bool, patches carried by a row without a cell (EViT).
      row: `[N0]` the row that carries a patch, -1 if none does: one number, one token.
      grid: (rows, columns) of the patches.
    """

    kept: np.ndarray
    host: np.ndarray
    fused: np.ndarray
    row: np.ndarray
    grid: tuple[int, int]

    @property
    def fused_tokens(self) -> int:
        """How many rows without a cell stand for patches."""
        return np.unique(self.row[self.fused]).size

    @property
    def absorbed(self) -> np.ndarray:
        """`[N0]` bool, patches carried by another patch's row."""
        return (self.host >= 0) & ~self.kept

    @property
    def dropped(self) -> np.ndarray:
        """`[N0]` bool, patches no row stands for."""
        return (self.host < 0) & ~self.fused

    def summary(self) -> str:
        """One line of counts, e.g. `24 of 49 patches kept, 25 absorbed by 9 hosts`."""
        hosts = np.unique(self.host[self.absorbed]).size
        tokens = self.fused_tokens
        parts = [f"{self.kept.sum()} of {self.kept.size} patches kept"]
        for which, text in (
            (self.absorbed, f"absorbed by {hosts} host{'s' * (hosts != 1)}"),
            (self.fused, f"in {tokens} fused token{'s' * (tokens != 1)}"),
            (self.dropped, "dropped"),
        ):
            parts += [f"{which.sum()} {text}"] if which.any() else []
        return ", ".join(parts)


def fate(reduction: Reduction, index: int = 0) -> Fate:
    """Reads the fate of each patch of image `index` after one site.

    Raises:
      ValueError: a reduction whose `carrier` was not filled in by a trunk.
    """
    if reduction.carrier is None:
        raise ValueError("this Reduction has no carrier: take it from a model's Output.reductions")
    carrier = np.asarray(reduction.carrier[index])
    place = np.asarray(reduction.place[index])
    carried = carrier >= 0
    host = np.where(carried, place[np.maximum(carrier, 0)], -1)
    kept = host == np.arange(host.size)
    row = np.where(carried, carrier, -1)
    return Fate(kept=kept, host=host, fused=carried & (host < 0), row=row, grid=tuple(reduction.grid))


def picture(
    image: np.ndarray,
    reductions: Sequence[Reduction],
    *,
    index: int = 0,
    at: Sequence[int] | None = None,
    noun: str = "block",
    title: str | None = None,
) -> Any:
    """Draws the input and, per stage, kept patches and who absorbed whom.

    Args:
      image: `[H, W]`, `[H, W, 1]` or `[H, W, 3]`; uint8, or float in [0, 1].
      reductions: `Output.reductions`.
      index: which image of the batch the reductions are read for.
      at: index of each site, for the panel titles.
      noun: what that index counts.
      title: a line above everything.

    Returns:
      A matplotlib `Figure`; `figures.save` writes it.

    Raises:
      ValueError: no reductions, or an image of another rank.
      ModuleNotFoundError: matplotlib is absent; the message says what to install.
    """
    if not reductions:
        raise ValueError(
            "nothing to draw: the model reduces no tokens (choose one with a method, e.g. dtps_...)"
        )
    rgb = figures.to_rgb(image)
    fates = [fate(reduction, index) for reduction in reductions]
    second = any(f.absorbed.any() or f.fused.any() for f in fates)
    rows, columns = 1 + second, 1 + len(fates)
    tall = PANEL * rgb.shape[0] / rgb.shape[1]
    figure = figures.figure(PANEL * columns, (tall + 0.26) * rows + 0.4, dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    high, wide = grid = fates[0].grid
    _panel(axes[0, 0], rgb, grid, f"input: {high} x {wide} = {high * wide} patches")
    axes[0, 0].hlines(range(1, high), 0, wide, colors="#888888", linewidth=0.4)
    axes[0, 0].vlines(range(1, wide), 0, high, colors="#888888", linewidth=0.4)
    palette = _palette(fates)
    for stage, f in enumerate(fates):
        where = f"stage {stage + 1}" if at is None else f"{noun} {at[stage]}"
        where += f", {f.grid[0]} x {f.grid[1]}" if f.grid != grid else ""
        _panel(axes[0, stage + 1], faded(rgb, f), f.grid, f"{where}: {f.kept.sum()} of {f.kept.size} kept")
        outline(axes[0, stage + 1], f.kept, f.grid, INK, 0.8)
        if second:
            _groups(axes[1, stage + 1], rgb, f, palette)
    if second:
        _legend(axes[1, 0], fates)
    figure.suptitle(title or "Tokens kept by each stage (pale: no longer a token)", fontsize=11, color=INK)
    return figure


def faded(rgb: np.ndarray, f: Fate) -> np.ndarray:
    """`rgb [H, W, 3]` with the patches that are not kept faded to paper."""
    pale = (1 - FADE) * rgb.mean(axis=-1, keepdims=True) + FADE * PAPER
    return np.where(pixels(f.kept, f.grid, rgb)[..., None], rgb, pale)


def pixels(cells: np.ndarray, grid: tuple[int, int], rgb: np.ndarray) -> np.ndarray:
    """Values per cell `[N0, ...]` to values per pixel `[H, W, ...]`."""
    y, x = (np.arange(size) * n // size for size, n in zip(rgb.shape[:2], grid, strict=True))
    return cells.reshape(*grid, *cells.shape[1:])[y[:, None], x[None, :]]


def _panel(axis: Any, rgb: np.ndarray, grid: tuple[int, int], title: str) -> None:
    figures.picture(axis, rgb, extent=(0, grid[1], grid[0], 0), interpolation="nearest")
    axis.set_box_aspect(rgb.shape[0] / rgb.shape[1])
    axis.set_title(title, fontsize=9, color=INK)


def outline(axis: Any, labels: np.ndarray, grid: tuple[int, int], colour: str, width: float) -> None:
    """Lines between neighbouring cells with different labels."""
    cells = labels.reshape(grid)
    below, right = np.argwhere(cells[1:] != cells[:-1]), np.argwhere(cells[:, 1:] != cells[:, :-1])
    lines = [((c, r + 1), (c + 1, r + 1)) for r, c in below] + [
        ((c + 1, r), (c + 1, r + 1)) for r, c in right
    ]
    _add_lines(axis, lines, colors=[colour], linewidths=width)


def _add_lines(axis: Any, lines: Sequence[Any], **style: Any) -> None:
    axis.add_collection(figures.matplotlib("collections").LineCollection(lines, **style))


def _palette(fates: Sequence[Fate]) -> Palette:
    """A colour per host cell, the same at every stage; neighbours are far apart in hue."""
    hosts = np.unique(np.concatenate([f.host[f.absorbed] for f in fates]))
    golden = 0.61803
    return {
        int(host): colorsys.hsv_to_rgb(
            (0.58 + golden * i) % 1.0, (0.72, 0.45)[i % 2], (0.97, 0.9, 0.8)[i % 3]
        )
        for i, host in enumerate(hosts)
    }


def _groups(axis: Any, rgb: np.ndarray, f: Fate, palette: Palette) -> None:
    """Paints each group in one colour, ties every absorbed patch to its host, and dots the host."""
    hosts = np.unique(f.host[f.absorbed]).tolist()
    tint = np.ones((f.kept.size, 3), np.float32)
    for host in hosts:
        tint[f.host == host] = palette[host]
    tint[f.fused] = FUSED_COLOUR
    shade = 0.62 + 0.38 * rgb.mean(axis=-1, keepdims=True)  # the image stays visible within a colour
    _panel(axis, pixels(tint, f.grid, rgb) * shade, f.grid, f.summary().partition("kept, ")[2])
    outline(axis, np.where(f.fused, -2, f.host), f.grid, "#ffffff", 0.7)
    if not hosts:
        return
    y, x = np.divmod(np.arange(f.host.size), f.grid[1])
    centres = np.stack([x + 0.5, y + 0.5], axis=1)
    ties = [(centres[i], centres[f.host[i]]) for i in np.flatnonzero(f.absorbed)]
    scale = 7.0 / max(f.grid)  # thinner on a finer grid
    _add_lines(axis, ties, colors=[INK], linewidths=0.45 + 0.4 * scale, alpha=min(0.85, 0.3 + 0.5 * scale))
    fill = [palette[host] for host in hosts]
    axis.scatter(*centres[hosts].T, s=40 * scale, c=fill, edgecolors=INK, linewidths=0.9, zorder=3)


def _legend(axis: Any, fates: Sequence[Fate]) -> None:
    """Says in words what the second row shows."""
    axis.axis("off")
    lines = []
    if any(f.absorbed.any() for f in fates):
        lines += ["one colour = one token", "dot = its host, a kept patch", "line = a patch absorbed by it"]
    if any(f.fused.any() for f in fates):
        lines += ["orange = patches fused into", "tokens without a place"]
    lines += ["grey = a kept patch that", "stands for itself only"]
    text = "What each token stands for\n\n" + "\n".join(lines)
    axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, color=INK, transform=axis.transAxes)
