import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.ops import backend, select

SCORES = st.lists(st.integers(-3, 3), min_size=2, max_size=9).map(lambda v: np.array([v], np.float32))
ORDERS = {platform: jax.jit(lambda scores: select.order(scores)) for platform in ("cpu", "tpu")}
split = jax.jit(select.split, static_argnums=1)


@hypothesis.given(SCORES)
def test_order_is_the_same_on_every_platform(scores):
    expected = sorted(range(scores.shape[1]), key=lambda i: (-float(scores[0, i]), i))
    for platform, order in ORDERS.items():
        with backend.trace_for(platform):
            np.testing.assert_array_equal(order(scores)[0], expected)


@hypothesis.given(SCORES, st.data())
def test_split_is_a_partition(scores, data):
    n = scores.shape[1]
    keep = data.draw(st.integers(1, n))
    kept, dropped = jax.device_get(split(scores, keep))
    assert kept.shape == (1, keep)
    assert sorted([*kept[0].tolist(), *dropped[0].tolist()]) == list(range(n))
    if keep < n:
        assert float(scores[0, kept[0]].min()) >= float(scores[0, dropped[0]].max())


@pytest.mark.parametrize("keep", [0, 4, -1])
def test_split_refuses_a_keep_out_of_range(keep):
    with pytest.raises(ValueError, match="between 1 and the 3 rows"):
        select.split(jnp.zeros((1, 3)), keep)


def test_take_is_exact_on_every_platform():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    rows = jnp.array([[4, 0], [2, 2]])
    expected = np.stack([x[0, jnp.array([4, 0])], x[1, jnp.array([2, 2])]])
    for platform in ("cpu", "tpu"):
        with backend.trace_for(platform):
            np.testing.assert_array_equal(select.take(x, rows), expected)


def test_addresses_literal():
    # rows 0..3; row 2 kept as new row 0, row 0 as new row 1; 1 squeezed into 0 (new 1); 3 dropped.
    remap = jnp.array([[1, 1, 0, -1]])
    carrier = jnp.array([[0, 1, 2, 3, 3, -1]])
    new = select.lookup(remap, carrier)
    np.testing.assert_array_equal(new, [[1, 1, 0, -1, -1, -1]])
    np.testing.assert_array_equal(select.sizes(new, 2), [[1.0, 2.0]])
    np.testing.assert_array_equal(select.inverse(jnp.array([[2, 0]]), 4), [[1, -1, 0, -1]])
    np.testing.assert_array_equal(select.mask_of(jnp.array([[2, 0]]), 4), [[1, 0, 1, 0]])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_reading_rows_with_zeros_for_none(platform):
    maps = np.arange(18.0, dtype=np.float32).reshape(1, 2, 3, 3)
    rows = jnp.array([[0, 2, -1, 2]])
    s = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]], np.float32)
    with backend.trace_for(platform):
        np.testing.assert_array_equal(select.gather_or_zero(jnp.asarray(maps[:, 0]), rows), [s @ maps[0, 0]])
        np.testing.assert_array_equal(select.read_maps(jnp.asarray(maps), rows), s @ maps @ s.T)


def test_survivors_and_rows_beside_the_prefix():
    carrier, place = jnp.array([[1, 1, -1, 0, 2]]), jnp.array([[3, 1, -1]])
    found = select.survivors(carrier, place)  # patch 0 was absorbed, 2 dropped, 4 fused
    np.testing.assert_array_equal(found, [[-1, 1, -1, 0, -1]])
    np.testing.assert_array_equal(select.shift_past_prefix(found, 2), [[0, 1, -1, 3, -1, 2, -1]])


def test_rows_are_outermost_on_a_tpu_alone_and_not_in_an_export():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    for platform, stable, asked in (("tpu", False, True), ("tpu", True, False), ("cpu", False, False)):
        with backend.trace_for(platform, stable=stable):
            program = jax.jit(lambda x: select.rows_outermost(jnp.sin(x))).lower(x)
            np.testing.assert_array_equal(program.compile()(x), jax.jit(jnp.sin)(x))
            assert ("dense<[2, 0, 1]>" in program.as_text()) == asked  # minor to major: channels, batch, rows
    with backend.trace_for("tpu"):
        gradient = jax.grad(lambda x: (select.rows_outermost(x) * x).sum())(x)
    np.testing.assert_array_equal(gradient, 2.0 * x)
