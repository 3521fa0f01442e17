"""Batches made in a thread while the device works, and iterators that end before the interpreter does."""

from __future__ import annotations

import atexit
import contextlib
import functools
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END = object()
_open: weakref.WeakSet[Any] = weakref.WeakSet()


def close_at_exit(iterator: Any) -> Any:
    """Returns it; its `close` is called at exit if it is still in use.

    TensorFlow's threads may be in Python then (`decode.decode`); once the interpreter is
    gone they wait for it forever, and the process for them.
    """
    _register()
    _open.add(iterator)
    return iterator


@functools.cache
def _register() -> None:
    atexit.register(_close)  # after TensorFlow's own, which so run later


def _close() -> None:
    # Threads that run iterators first (`Prefetch`), then iterators.
    for iterator in sorted(_open, key=lambda one: hasattr(one, "send")):
        with contextlib.suppress(Exception):
            iterator.close()


class Prefetch(Generic[T]):
    """An iterator that keeps up to `size` items ready; see `prefetch`."""

    def __init__(self, iterator: Iterator[T], size: int):
        self._iterator = iterator
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(size)
        self._stop = threading.Event()
        self._done = False
        self._thread = threading.Thread(target=self._fill, name="dyntoken-prefetch", daemon=True)
        self._thread.start()

    def _put(self, item: tuple[Any, BaseException | None]) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return True
        return False

    def _fill(self) -> None:
        try:
            for item in self._iterator:
                if not self._put((item, None)):
                    break
            else:
                self._put((_END, None))
        except BaseException as error:  # handed to the consumer, which raises it
            self._put((_END, error))
        finally:
            if hasattr(self._iterator, "close"):
                self._iterator.close()

    def __iter__(self) -> Prefetch[T]:
        return self

    def ready(self) -> bool:
        """Whether `next` would return (or raise) at once."""
        return self._done or not self._queue.empty()

    def __next__(self) -> T:
        if self._done:
            raise StopIteration
        item, error = self._queue.get()
        if item is _END:
            self.close()
            raise StopIteration if error is None else error
        return item

    def close(self) -> None:
        """Stops the thread and closes the wrapped iterator; may be repeated."""
        self._done = True
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def prefetch(iterator: Iterator[T], size: int = 2) -> Prefetch[T]:
    """Runs an iterator ahead in a thread, which keeps `size` items ready and closes it at the end.

    An exception of the iterator is raised by the `next` that reaches it. Use it
    as a context manager or call `close()`; after that it is exhausted.
    """
    if size < 1:
        raise ValueError(f"prefetch size is {size}; it must be at least 1")
    return close_at_exit(Prefetch(iterator, size))
