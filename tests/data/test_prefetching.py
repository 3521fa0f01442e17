"""The thread that makes batches ahead."""

import threading

import pytest

from dyntoken.data import prefetch


def counting(limit, log):
    try:
        for i in range(limit):
            log.append(i)
            yield i
    finally:
        log.append("closed")


def test_order_and_end():
    log = []
    with prefetch(counting(5, log), 2) as items:
        assert list(items) == [0, 1, 2, 3, 4]
    assert log[-1] == "closed"
    with pytest.raises(StopIteration):
        next(items)


def test_runs_ahead_by_its_size_only():
    log, ready = [], threading.Event()

    def slow():
        for i in range(100):
            log.append(i)
            if i == 3:
                ready.set()
            yield i

    with prefetch(slow(), 3) as items:
        assert ready.wait(5)  # 3 in the queue, one in hand, none taken
        assert next(items) == 0
        assert len(log) <= 5


def test_exceptions_arrive_in_their_place():
    def broken():
        yield 1
        raise KeyError("lost")

    items = prefetch(broken(), 4)
    assert next(items) == 1
    with pytest.raises(KeyError, match="lost"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_close_stops_the_thread():
    log = []
    items = prefetch(counting(10**9, log), 2)
    assert next(items) == 0
    items.close()
    items.close()
    assert log[-1] == "closed" and len(log) < 10
    assert not any(t.name == "dyntoken-prefetch" and t.is_alive() for t in threading.enumerate())


def test_size_is_checked():
    with pytest.raises(ValueError, match="at least 1"):
        prefetch(iter([]), 0)
