"""Rows that wait for an exit: ring buffers on the devices, their books on the host."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Rows(NamedTuple):
    """What an exit needs of its images; every leaf has the rows in front.

    Attributes:
      images: as they were given, uint8 or float.
      upstream: what the exit before returned; None without reuse.
      leave: int32, the exit where the row must leave; -1 lets the rule decide.
      number: int32, number of the image in its set (keys the random rule).
    """

    images: Any
    upstream: Any
    leave: Any
    number: Any


def take(buffer: Rows, head: Array, count: int) -> Rows:
    """`count` (static) rows of a ring buffer, from slot `head` on."""

    def rows(leaf: Array) -> Array:
        slots = (head + jnp.arange(count)) % leaf.shape[0]
        return leaf.at[slots].get(mode="promise_in_bounds")

    return jax.tree.map(rows, buffer)


def put(buffer: Rows, tail: Array, rows: Rows, chosen: Array) -> Rows:
    """The buffer with the chosen rows (bool `[n]`) written one after the other from slot `tail` on."""
    place = tail + jnp.cumsum(chosen.astype(jnp.int32)) - 1

    def write(leaf: Array, new: Array) -> Array:
        # Slots beyond the end are dropped; distinct ones, as the promise below wants.
        beyond = leaf.shape[0] + jnp.arange(new.shape[0])
        slots = jnp.where(chosen, place % leaf.shape[0], beyond)
        return leaf.at[slots].set(new, mode="drop", unique_indices=True)

    return jax.tree.map(write, buffer, rows)


class Ring:
    """The host's side of one exit's ring buffers, one per device: where rows lie and which rows they are.

    Attributes:
      head: int32 `[devices]`, slot of the first waiting row.
    """

    def __init__(self, devices: int, slots: int):
        self.head = np.zeros(devices, np.int32)
        self._slots = np.int32(slots)
        self._ids = [collections.deque() for _ in range(devices)]

    @property
    def count(self) -> np.ndarray:
        """Waiting rows, int32 `[devices]`."""
        return np.array([len(ids) for ids in self._ids], np.int32)

    @property
    def tail(self) -> np.ndarray:
        """First free slot, int32 `[devices]`."""
        return (self.head + self.count) % self._slots

    @property
    def fullest(self) -> int:
        """Waiting rows of the device that has most."""
        return max(map(len, self._ids))

    def take(self, rows: int) -> np.ndarray:
        """Removes up to `rows` rows per device; their ids `[devices, rows]`, -1 where there is none."""
        self.head = (self.head + np.minimum(self.count, np.int32(rows))) % self._slots
        taken = [[ids.popleft() if ids else -1 for _ in range(rows)] for ids in self._ids]
        return np.array(taken, np.int64)

    def put(self, ids: np.ndarray, chosen: np.ndarray) -> None:
        """Appends the chosen ids (both `[devices, n]`) in order, as `put` does on the devices."""
        for waiting, row, which in zip(self._ids, ids, chosen, strict=True):
            waiting.extend(row[which].tolist())
