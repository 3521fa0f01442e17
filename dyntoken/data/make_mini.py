"""Writes the embedded data set from the idx files of Fashion-MNIST.

    python -m dyntoken.data.make_mini --idx_dir=/usr/share/datasets/fashion-mnist

The choice is deterministic: the first 1,000 training and the first 200 test
images of each class, in the order of the files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from dyntoken.data import idx, mini
from dyntoken.data.errors import DataError

PER_CLASS = {"train": 1000, "test": 200}
CLASSES = 10


def choose(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Indices of the first `per_class` examples of each class, ascending."""
    picks = [np.flatnonzero(labels == c)[:per_class] for c in range(CLASSES)]
    if min(map(len, picks)) < per_class:
        raise DataError(f"a class has fewer than {per_class} images: is this the whole Fashion-MNIST?")
    return np.sort(np.concatenate(picks))


def build(idx_dir: str | Path) -> dict[str, np.ndarray]:
    """The arrays of the embedded set, as they are stored (all uint8)."""
    arrays = {}
    for split, per_class in PER_CLASS.items():
        images, labels = idx.read_split(idx_dir, split)
        keep = choose(labels, per_class)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[keep], labels[keep].astype(np.uint8)
    return arrays


def main(argv: list[str] | None = None) -> int:
    """Writes the embedded set; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dyntoken.data.make_mini", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--idx_dir", required=True, help="folder of the four idx .gz files")
    parser.add_argument("--out", default=str(mini.DATA), help="file to write (default: the package's own)")
    flags = parser.parse_args(argv)
    try:
        arrays = build(flags.idx_dir)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    np.savez_compressed(flags.out, **arrays)
    print(f"wrote {flags.out} ({Path(flags.out).stat().st_size:,} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
