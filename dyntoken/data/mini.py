"""`fashion_mnist_mini`: real images that come with the package.

10,000 training and 2,000 test images of Zalando's Fashion-MNIST (Xiao, Rasul,
Vollgraf 2017, MIT licence); see fashion_mnist_mini/README.md.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from dyntoken.data.errors import MissingDataError
from dyntoken.data.in_memory import ArrayRows, ArraySource
from dyntoken.data.known_datasets import KNOWN_DATASETS

FOLDER = Path(__file__).parent / "fashion_mnist_mini"
DATA = FOLDER / "data.npz"


@functools.lru_cache(maxsize=1)
def _load() -> dict[str, ArrayRows]:
    if not DATA.exists():
        raise MissingDataError(
            f"the package lacks {DATA}: install it again, or make it, in a clone, with "
            "`python scripts/prepare_data.py mini --source=DIR`"
        )
    with np.load(DATA, allow_pickle=False) as stored:
        return {
            split: ArrayRows(stored[f"{split}_images"], stored[f"{split}_labels"].astype(np.int32))
            for split in ("train", "test")
        }


def open_mini(name: str, data_dir: str | None) -> ArraySource:
    """The embedded set; needs numpy only and reads nothing from `data_dir`."""
    return ArraySource(KNOWN_DATASETS[name], lambda split: _load()[split])
