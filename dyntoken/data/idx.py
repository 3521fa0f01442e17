"""The idx format of MNIST and its successors (http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

import numpy as np

from dyntoken.data.errors import DataError, MissingDataError

FILES = {"train": "train", "test": "t10k"}  # split -> prefix of the two files


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """A gzipped idx file of unsigned bytes, uint8 of the shape it states."""
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise MissingDataError(
            f"no file {path}: give the folder of the four idx .gz files with --idx_dir "
            "(Debian: apt install dataset-fashion-mnist, then --idx_dir=/usr/share/datasets/fashion-mnist)"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}): fetch it again") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an idx file of unsigned bytes")
    start = 4 + 4 * data[3]
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4"))
    if len(shape) != data[3] or len(data) - start != int(np.prod(shape)):
        raise DataError(f"{path} does not hold the {shape} bytes that its header states: fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_split(idx_dir: str | os.PathLike, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[n, 28, 28, 1]` and labels int32 `[n]` of "train" or "test"."""
    prefix = Path(idx_dir) / FILES[split]
    images = read_idx(f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(f"{prefix}-labels-idx1-ubyte.gz")
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(
            f"{idx_dir}: {split} images {images.shape} and labels {labels.shape} do not belong together"
        )
    return images[..., None], labels.astype(np.int32)
