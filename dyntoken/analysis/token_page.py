"""One HTML page of what models keep: a slider over keep rates, and the patches that a token stands for light up.

It holds everything itself, pictures included, and needs no network.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dyntoken.analysis.token_maps import Fate
from dyntoken.analysis.token_strips import Row, level

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
QUALITY = 85  # of the pictures, JPEG


def page(views: Sequence[Sequence[Sequence[Row]]], rates: Sequence[float], *, start: int, title: str) -> str:
    """The page as text.

    Args:
      views: `[picture][model][rate]`; rows of the same picture share its image.
      rates: what the slider goes over.
      start: which of them is shown first.
      title: of the page.
    """
    data = {
        "pictures": [_picture(models[0][0]) for models in views],
        "models": [rows[0].label for rows in views[0]],
        "rates": list(rates),
        "start": start,
        "views": [[[_view(row) for row in rows] for rows in models] for models in views],
    }
    text = importlib.resources.files("dyntoken.analysis").joinpath("token_page.html").read_text()
    # Inside of a script element nothing is escaped but its end.
    packed = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    parts = {"title": html.escape(title), "data": packed}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text)


def _picture(row: Row) -> dict[str, str]:
    from PIL import Image

    pixels = np.asarray(row.image)
    if pixels.dtype != np.uint8:
        pixels = np.round(255 * pixels).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
        buffer, "JPEG", quality=QUALITY, subsampling=0
    )
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {"name": row.name, "src": f"data:image/jpeg;base64,{encoded}"}


def _view(row: Row) -> dict[str, Any]:
    sites = zip(row.fates, row.scores, row.stages, strict=True)
    return {
        "caption": row.caption,
        "stages": [
            {"name": name, "grid": list(f.grid), "tokens": tokens_of(f), "scores": digits(scores)}
            for f, scores, name in sites
        ],
    }


def tokens_of(f: Fate) -> list[int]:
    """For each patch the cell of its token, -1 if it has none, -2 and below for tokens without a cell."""
    return np.where(f.fused, -2 - f.row, f.host).tolist()


def digits(scores: np.ndarray) -> str:
    """Ranks of scores to the base 36, a digit each, "." where there is none."""
    ranks = np.round(level(scores) * (len(DIGITS) - 1)).astype(int)
    return "".join(
        DIGITS[rank] if known else "." for rank, known in zip(ranks, np.isfinite(scores), strict=True)
    )
