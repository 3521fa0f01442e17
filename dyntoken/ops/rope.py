"""Rotary position embeddings of patches on a grid: queries and keys turned by angles of their place.

Su et al. 2021, "RoFormer", over two axes: the first half of the frequencies sees the row,
the second half the column. Rows that stand for no place (class token, registers, a fused
token) are not turned.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.ops import select

Array = jax.Array


def _centred(count: int, reference: int | None) -> np.ndarray:
    """DINOv3: patch centres of an axis on [-1, 1], times 2 pi."""
    return 2 * np.pi * (2 * (np.arange(count) + 0.5) / count - 1)


def _index(count: int, reference: int | None) -> np.ndarray:
    """EVA-02: patch numbers, scaled to those of the axis in pretraining."""
    return np.arange(count) * ((reference or count) / count)


COORDINATES = {"centred": _centred, "index": _index}
LAYOUTS = ("halves", "pairs")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["cos", "sin"], meta_fields=["halves"])
@dataclasses.dataclass(frozen=True)
class Rotation:
    """How each row turns.

    Attributes:
      cos, sin: `[1 or B, 1, T, D / 2]` float32, an angle per pair of channels.
      halves: a channel's partner is D / 2 away; False: beside it.
    """

    cos: Array | np.ndarray
    sin: Array | np.ndarray
    halves: bool

    def __call__(self, x: Array) -> Array:
        """Rows `x [B, heads, T, D]`, turned in float32."""
        y = x.astype(jnp.float32)
        a, b = jnp.split(y, 2, axis=-1) if self.halves else (y[..., ::2], y[..., 1::2])
        turned = (a * self.cos - b * self.sin, b * self.cos + a * self.sin)
        y = jnp.concatenate(turned, axis=-1) if self.halves else jnp.stack(turned, axis=-1).reshape(x.shape)
        return y.astype(x.dtype)

    def of(self, rows: Array | None, new: int) -> Rotation:
        """Those of other rows.

        Args:
          rows: `[B, T]` rows of this one, or -1 for one that is not turned; None for all in order.
          new: number of further rows that are not turned.
        """
        if rows is None and not new:
            return self
        count, size = self.cos.shape[2:]
        still = np.concatenate([np.ones((1, size)), np.zeros((1, size))], axis=1)
        table = np.concatenate([self.cos[0, 0], self.sin[0, 0]], axis=1)
        table = np.concatenate([table, *[still] * max(1, new)]).astype(np.float32)
        if rows is None:
            found = table[None, None]
        else:
            batched = jnp.broadcast_to(table[None], (rows.shape[0], *table.shape))
            found = select.take(batched, jnp.where(rows < 0, count, rows))[:, None]
        return Rotation(found[..., :size], found[..., size:], self.halves)


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding, the same in all blocks.

    Attributes:
      size: channels of a head, a multiple of 4.
      coordinates: row of `COORDINATES`.
      layout: which channels turn together, see `Rotation.halves`.
      base: the longest period is about that many times the shortest.
      reference: (rows, columns) of patches that numbers refer to, with "index".
    """

    size: int
    coordinates: str
    layout: Literal["halves", "pairs"]
    base: float
    reference: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.size % 4:
            raise ValueError(f"rope needs heads of 4, 8, ... channels, not {self.size}")

    def whole(self, grid: tuple[int, int], prefix: int) -> Rotation:
        """The rotation of `prefix` rows, which stay as they are, and of all patches."""
        return _whole(self, grid, prefix)

    def angles(self, grid: tuple[int, int]) -> np.ndarray:
        """One per channel, `[N, size]`, row-major patches."""
        coordinates = COORDINATES[self.coordinates]
        axes = [coordinates(n, r) for n, r in zip(grid, self.reference or (None, None), strict=True)]
        frequencies = self.base ** (-np.arange(self.size // 4) / (self.size // 4))
        places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2, 1)
        angles = (places * frequencies).reshape(len(places), -1)  # [N, size / 2]
        return np.tile(angles, 2) if self.layout == "halves" else np.repeat(angles, 2, axis=1)


@functools.lru_cache(maxsize=32)  # one array per grid: the blocks of a program share one constant
def _whole(rope: Rope, grid: tuple[int, int], prefix: int) -> Rotation:
    halves = rope.layout == "halves"
    angles = rope.angles(grid)  # partners have the same
    angles = angles[:, : rope.size // 2] if halves else angles[:, ::2]
    angles = np.pad(angles, ((prefix, 0), (0, 0)))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return Rotation(cos[None, None], sin[None, None], halves)
