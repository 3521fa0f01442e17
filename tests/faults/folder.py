"""A folder of four classes as a user has it; `make_folder(root)` writes it in a moment.

train/ and val/, classes "1", "2", "10" and "20", whose images are of one hue each (red,
green, blue, grey), of many formats, some in folders of their class's folder; one damaged
image, named with a blank, an umlaut and a line break; what programs leave behind.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np
from PIL import Image

CLASSES = ("1", "2", "10", "20")  # in the order of their labels
HUES = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (128, 128, 128))
SUFFIXES = (".jpg", ".webp", ".png", ".tif", ".bmp", ".JPEG", ".gif", ".ppm")
DAMAGED = "kaputtes Bild \u00fc\n1.jpg"  # in train/2


def picture(label: int, seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A noisy picture (width, height) whose mean colour tells its class."""
    noise = np.random.default_rng(seed).integers(-30, 31, (size[1], size[0], 3))
    return Image.fromarray((np.array(HUES[label]) + noise).clip(0, 255).astype(np.uint8))


def make_folder(root: str | os.PathLike, train: int = 16, val: int = 4, damaged: bool = True) -> pathlib.Path:
    """Writes the folder; so many images per class in each split, the damaged one besides."""
    root = pathlib.Path(root)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                folder = root / split / name / ("" if number % 4 else "more/of them")
                folder.mkdir(parents=True, exist_ok=True)
                size = (24, 20) if number % 3 else (17, 33)
                seed = 1000 * label + number + (500 if split == "val" else 0)
                picture(label, seed, size).save(folder / f"{number}{SUFFIXES[number % len(SUFFIXES)]}")
    (root / "train" / "2" / "Thumbs.db").write_bytes(b"x")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "__MACOSX" / "train").mkdir(parents=True)
    (root / "__MACOSX" / "train" / "._a.jpg").write_bytes(b"x")
    if damaged:
        whole = (root / "train" / "2" / "1.webp").read_bytes()
        (root / "train" / "2" / DAMAGED).write_bytes(whole[: len(whole) // 2])
    return root
