"""`fake`: endless coloured patches, made from the example's number.

An image is a 4 x 4 board of dim grey cells with a few bright patches. The hue
of the patches names the class; beyond eight classes their cells do too. Easy
to learn, and the patches are what a token reducer should keep.
"""

from __future__ import annotations

import colorsys

import numpy as np

from dyntoken.data import hash_rng
from dyntoken.data.errors import DataError
from dyntoken.data.in_memory import ArraySource
from dyntoken.data.info import DataInfo
from dyntoken.data.requests import check_size
from dyntoken.schema import Count, Size

HUES, BOARD = 8, 4
_DIGIT = HUES * BOARD  # classes that one patch, in its own row of the board, can tell apart
_FREE_PATCHES = 3  # patches per image while the hue alone names the class
_GREY, _CELL = 1, 2  # names of the draws


def _palette(channels: int) -> np.ndarray:
    """uint8 `[HUES, channels]`: hues, or grey levels where there is no colour."""
    if channels == 3:
        rgb = [colorsys.hsv_to_rgb(h / HUES, 0.9, 1.0) for h in range(HUES)]
        return np.rint(np.array(rgb) * 255).astype(np.uint8)
    levels = np.rint(np.linspace(80, 255, HUES)).astype(np.uint8)
    return np.repeat(levels[:, None], channels, axis=1)


class FakeRows:
    """One split; example i is the same image in every run."""

    def __init__(self, split: str, shape: tuple[int, int, int], num_classes: int):
        self._key = sum(split.encode())
        self._shape, self._classes = shape, num_classes
        self._palette = _palette(shape[2])
        self._rows = np.arange(shape[0]) * BOARD // shape[0]  # board row of each pixel row
        self._columns = np.arange(shape[1]) * BOARD // shape[1]

    def _boards(self, indices: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """uint8 `[n, BOARD * BOARD, C]`, one colour per cell."""
        cells = np.arange(BOARD * BOARD)
        grey = (hash_rng.uniform(self._key, _GREY, indices[:, None], cells[None]) * 60).astype(np.uint8)
        boards = np.repeat(grey[:, :, None], self._shape[2], axis=2)
        row = np.arange(len(indices))
        if self._classes <= HUES:
            order = hash_rng.bits(self._key, _CELL, indices[:, None], cells[None]).argsort(1)
            boards[row[:, None], order[:, :_FREE_PATCHES]] = self._palette[labels][:, None]
            return boards
        for level in range(BOARD):
            if self._classes > _DIGIT**level:
                digit = labels // _DIGIT**level % _DIGIT
                boards[row, level * BOARD + digit // HUES] = self._palette[digit % HUES]
        return boards

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices = np.asarray(indices)
        labels = (indices % self._classes).astype(np.int32)
        boards = self._boards(indices, labels)
        cells = self._rows[:, None] * BOARD + self._columns[None]  # [H, W]
        return boards[:, cells], labels


def open_fake(
    name: str,
    data_dir: str | None,
    *,
    num_classes: Count = 10,
    train: Count = 512,
    test: Count = 130,
    image_size: Size = 32,
    channels: Count = 3,
) -> ArraySource:
    """Generated images, `train` and `test` of them; example i has class i modulo `num_classes`."""
    if num_classes > _DIGIT**BOARD:
        raise DataError(
            f"option num_classes={num_classes} of data set {name!r} must be at most {_DIGIT**BOARD}"
        )
    shape = (*check_size(image_size, None), channels)
    splits = {"train": train, "test": test}
    info = DataInfo(name, num_classes, shape, splits, (0.5,) * channels, (0.25,) * channels)
    return ArraySource(info, {split: FakeRows(split, shape, num_classes) for split in splits})
