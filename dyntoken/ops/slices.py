"""Batches that outgrow a processor's caches, run in slices.

Images do not see each other in evaluation, so a loop over slices of a batch computes
what the whole batch would. On a CPU it is faster: what a layer writes, the next one
finds in the cache.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dyntoken.ops import backend

Array = jax.Array
_SIZE: contextvars.ContextVar[int | None] = contextvars.ContextVar("dyntoken_slice", default=None)
PIXELS = 2 * 224 * 224  # of a slice, for each core: measured with DeiT-S, see docs/speed.md


@contextlib.contextmanager
def of(images: int) -> Iterator[None]:
    """Traces for slices of so many images, whatever the platform; 0 for whole batches."""
    token = _SIZE.set(images)
    try:
        yield
    finally:
        _SIZE.reset(token)


def size(shape: tuple[Any, ...]) -> int:
    """Images of a slice for a batch `[B, H, W, C]`, a divisor of B; 0 where it is run whole.

    That is so except on a CPU, and for a B that is symbolic, small, or has no fitting divisor.
    """
    batch, height, width = shape[:3]
    wanted = _SIZE.get()
    if wanted is None:
        wanted = max(1, _cores() * PIXELS // (height * width)) if backend.platform() == "cpu" else 0
    if not isinstance(batch, int) or not wanted or batch <= wanted:
        return 0
    return next((s for s in range(wanted, (wanted - 1) // 2, -1) if batch % s == 0), 0)


@functools.cache
def _cores() -> int:
    """Cores that a device has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, jax.local_device_count("cpu")))


def run(fn: Callable[[Array, Array], Any], images: Array, ids: Array, size: int) -> Any:
    """`fn(images, ids)` of slices of `size` images, one after the other; results keep the slices apart.

    Args:
      images, ids: `[B, ...]`; B is a multiple of `size`.

    Returns:
      What `fn` returns, each array with a first axis B / size; `joined` takes it away.
    """
    cut = [a.reshape(-1, size, *a.shape[1:]) for a in (images, ids)]
    return jax.lax.map(lambda one: fn(*one), tuple(cut))


def joined(x: Array, axis: int = 0) -> Array:
    """`[slices, ..., size, ...]` to `[..., B, ...]`, the images at `axis` of what one slice has."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
