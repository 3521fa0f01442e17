"""Empty cells of a grid from the known ones: exact where it can be, never outside their range."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.ops import backend, fill_grid

GRID = (4, 5)
Y, X = np.divmod(np.arange(20), 5)
RAMP = np.stack([2.0 * Y - 3.0 * X + 1.0, 0.5 * X], axis=-1)[None].astype(np.float32)
KNOWN = st.lists(st.booleans(), min_size=20, max_size=20).map(lambda v: np.array([v]))
fill = jax.jit(lambda cells, known: fill_grid.between(cells, known, GRID))


def by_loop(cells, known):
    """The definition, cell by cell."""
    known, cells = known.reshape(GRID), cells.reshape(*GRID, -1)
    out = cells.copy()
    where = np.argwhere(known)
    for y, x in np.argwhere(~known):
        lines = []
        for axis, at in ((0, y), (1, x)):
            line, values = (known[:, x], cells[:, x]) if axis == 0 else (known[y], cells[y])
            low, high = np.flatnonzero(line[:at]), np.flatnonzero(line[at + 1 :])
            if len(low) and len(high):
                a, b = low[-1], at + 1 + high[0]
                lines.append((1 / (b - a), values[a] + (values[b] - values[a]) * (at - a) / (b - a)))
        if not lines:
            lines = [(1 / ((y - v) ** 2 + (x - u) ** 2), cells[v, u]) for v, u in where] or [
                (1, 0 * cells[0, 0])
            ]
        out[y, x] = sum(w * v for w, v in lines) / sum(w for w, _ in lines)
    return out.reshape(1, 20, -1)


@hypothesis.given(KNOWN, st.integers(0, 99))
def test_it_is_its_definition_on_every_platform(known, seed):
    cells = np.random.default_rng(seed).normal(size=(1, 20, 2)).astype(np.float32)
    found = np.asarray(fill(np.where(known[..., None], cells, np.nan), known))
    np.testing.assert_allclose(found, by_loop(cells, known), atol=1e-5)
    np.testing.assert_array_equal(found[known], cells[known])
    if known.any():
        assert (found <= cells[known].max(axis=0) + 1e-5).all()
        assert (found >= cells[known].min(axis=0) - 1e-5).all()


@pytest.mark.thorough
@hypothesis.given(KNOWN)
def test_a_ramp_is_exact_where_a_line_is_known_on_both_sides(known):
    grid = known[0].reshape(GRID)
    row = np.maximum.accumulate(grid, 1) & np.maximum.accumulate(grid[:, ::-1], 1)[:, ::-1]
    column = np.maximum.accumulate(grid, 0) & np.maximum.accumulate(grid[::-1], 0)[::-1]
    inside = (row | column).reshape(-1)
    np.testing.assert_allclose(fill(RAMP, known)[0, inside], RAMP[0, inside], atol=1e-5)


def test_a_tpu_fills_alike():
    known = np.random.default_rng(0).random((3, 20)) < 0.4
    cells = np.random.default_rng(1).normal(size=(3, 20, 2)).astype(np.float32)
    with backend.trace_for("tpu"):
        found = fill_grid.between(jnp.asarray(cells), known, GRID)
    np.testing.assert_allclose(found, fill(cells, known), atol=1e-6)
