"""Figures of matplotlib (`pip install matplotlib`): made, styled and saved; imported on first use.

No window and no state of pyplot: a figure is an object until `save` writes it.
"""

from __future__ import annotations

import importlib
import io
from typing import Any

import numpy as np
from etils import epath

INK, FRAME, GRID = "#222222", "#999999", "#e4e4e4"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6a3d9a", "#8c510a")


def matplotlib(module: str) -> Any:
    """A module of matplotlib; the error says what to install."""
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib: pip install matplotlib") from error


def figure(width: float, height: float, **options: Any) -> Any:
    """A white `Figure` of so many inches, 120 dots each, its axes laid out by matplotlib.

    Raises:
      ModuleNotFoundError: matplotlib is absent; the message says what to install.
    """
    options = {"dpi": 120, "layout": "constrained", "facecolor": "white", **options}
    return matplotlib("figure").Figure(figsize=(width, height), **options)


def curves(axis: Any, xlabel: str, ylabel: str) -> None:
    """Makes an axis one for curves: labelled, with a pale grid and no box."""
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def picture(axis: Any, image: np.ndarray, *, frame: str = FRAME, width: float = 0.6, **options: Any) -> None:
    """Shows an image (see `to_rgb`) that fills its axis, with a frame and without ticks."""
    axis.imshow(to_rgb(image), aspect="auto", **options)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(color=frame, linewidth=width)


def to_rgb(image: np.ndarray) -> np.ndarray:
    """An image `[H, W]`, `[H, W, 1]` or `[H, W, 3]`, uint8 or in [0, 1], as `[H, W, 3]` float32 in [0, 1]."""
    image = np.asarray(image)
    image = image.astype(np.float32) / (255.0 if image.dtype == np.uint8 else 1.0)
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(f"an image to draw is [H, W], [H, W, 1] or [H, W, 3], got {image.shape}")
    return np.clip(np.broadcast_to(image, (*image.shape[:2], 3)), 0.0, 1.0)


def save(figure: Any, path: Any, *, dpi: float | None = None) -> None:
    """Writes a figure as PNG, also to `gs://`, making the folder; by default at its own resolution."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi or figure.dpi)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
