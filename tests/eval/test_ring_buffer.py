"""Rings: the host's books and the rows on the device say the same."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.eval.ring_buffer import Ring, Rows, put, take


def test_rows_come_out_in_order_and_as_booked():
    """Three times around a ring of 6 slots: at most 3 rows in, at most 3 rows out."""
    draw = np.random.default_rng(2)
    books, expected, following = Ring(1, 6), [], 0
    ring = Rows(jnp.zeros((6, 2)), None, jnp.zeros(6, jnp.int32), jnp.zeros(6, jnp.int32))
    write, read = jax.jit(put), jax.jit(functools.partial(take, count=3))
    for _ in range(12):
        numbers = np.arange(following, following + 3, dtype=np.int32)
        following += 3
        chosen = draw.random(3) < 0.6
        rows = Rows(np.stack([numbers, -numbers], 1).astype(np.float32), None, numbers, numbers)
        ring = write(ring, int(books.tail[0]), rows, chosen)
        books.put(numbers[None], chosen[None])
        expected += numbers[chosen].tolist()
        while books.fullest >= 3:
            got = read(ring, int(books.head[0]))
            np.testing.assert_array_equal(books.take(3), [expected[:3]])
            np.testing.assert_array_equal(got.number, expected[:3])
            np.testing.assert_array_equal(got.images, [[n, -n] for n in expected[:3]])
            del expected[:3]
        assert books.count.tolist() == [len(expected)]
    assert following == 36 and 0 < len(expected) < 3
    np.testing.assert_array_equal(books.take(3), [expected + [-1] * (3 - len(expected))])
    assert books.fullest == 0


def test_devices_have_their_own_books():
    books = Ring(2, 4)
    books.put(np.array([[0, 1], [2, 3]]), np.array([[True, True], [False, True]]))
    assert (books.count.tolist(), books.fullest) == ([2, 1], 2)
    np.testing.assert_array_equal(books.take(1), [[0], [3]])
    assert (books.head.tolist(), books.tail.tolist()) == ([1, 1], [2, 1])
    np.testing.assert_array_equal(books.take(2), [[1, -1], [-1, -1]])
    assert (books.head.tolist(), books.count.tolist()) == ([2, 1], [0, 0])
