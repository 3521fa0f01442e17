"""Iterators that are still open when the interpreter ends.

TensorFlow's threads may be in Python then (`decode.decode`); once the interpreter is gone
they wait for it forever, and the process for them. So what is open is closed before.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import weakref
from typing import Any

_open: weakref.WeakSet[Any] = weakref.WeakSet()


def close_at_exit(iterator: Any) -> Any:
    """Returns it; its `close` is called at exit if it is still in use."""
    _arm()
    _open.add(iterator)
    return iterator


@functools.cache
def _arm() -> None:
    atexit.register(_close)  # after TensorFlow's own, which so run later


def _close() -> None:
    # Threads that run iterators first (`prefetching.Prefetch`), then iterators.
    for iterator in sorted(_open, key=lambda one: hasattr(one, "send")):
        with contextlib.suppress(Exception):
            iterator.close()
