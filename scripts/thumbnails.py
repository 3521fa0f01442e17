"""Runs notebooks at full length and writes the thumbnails of docs/notebooks.md, of each the last picture.

    python scripts/thumbnails.py                                     # all, some minutes each on two cores
    DYNTOKEN_WEIGHTS=dinov2_small python scripts/thumbnails.py pretrained

DYNTOKEN_WEIGHTS is what the notebook `pretrained` loads instead of what it downloads.
"""

from __future__ import annotations

import base64
import io
import os
import pathlib
import sys

import nbclient
import nbformat
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZE = (480, 320)
LIMIT_S = 1800  # of a cell


def picture(path: pathlib.Path) -> Image.Image:
    """The last picture that a notebook shows."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=LIMIT_S, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return Image.open(io.BytesIO(base64.b64decode(pictures[-1])))


def main(names: list[str]) -> None:
    """Writes docs/images/notebooks/NAME.png for some or all notebooks."""
    os.environ["PYTHONPATH"] = str(ROOT)
    folder = ROOT / "docs" / "images" / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "colabs").glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        print(path.stem, flush=True)
        made = picture(path).convert("RGB")
        made.thumbnail(SIZE, Image.Resampling.LANCZOS)
        made.quantize(64).save(folder / f"{path.stem}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
