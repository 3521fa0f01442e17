import jax.numpy as jnp
import numpy as np

from dyntoken.ops import windows


def test_partition_by_hand_and_back():
    cells = jnp.arange(24).reshape(1, 24, 1)  # 4 rows, 6 columns
    squares = windows.partition(cells, (4, 6), 2)
    assert squares.shape == (6, 4, 1)
    np.testing.assert_array_equal(squares[:2, :, 0], [[0, 1, 6, 7], [2, 3, 8, 9]])
    rolled = windows.partition(cells, (4, 6), 2, 1)
    np.testing.assert_array_equal(rolled[0, :, 0], [7, 8, 13, 14])
    np.testing.assert_array_equal(rolled[5, :, 0], [23, 18, 5, 0])  # around both edges
    for shift in (0, 1):
        both = jnp.concatenate([cells, cells + 24])
        np.testing.assert_array_equal(
            windows.merge(windows.partition(both, (4, 6), 2, shift), (4, 6), shift), both
        )


def test_offsets_are_relative_positions():
    np.testing.assert_array_equal(
        windows.relative_position_index(2).reshape(4, 4),
        [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]],
    )
    index = windows.relative_position_index(3).reshape(9, 9)
    assert index[8, 0] == 24 and index[0, 8] == 0 and (np.diag(index) == 12).all()


def test_cells_from_opposite_edges_do_not_see_each_other():
    mask = windows.shift_mask((4, 4), 2, 1)
    assert mask.shape == (4, 4, 4)
    assert (mask[0] == 0).all()  # inside the grid
    # The square at the right edge: its second column came round from the left.
    np.testing.assert_array_equal(mask[1, 0], [0, -100, 0, -100])
    assert (np.diag(mask[3]) == 0).all() and (mask[3] == -100).sum() == 12  # the corner: four regions


def test_apart_agrees_with_neighbourhood_after_the_roll():
    grid, side, shift = (6, 4), 2, 1
    rows, columns = np.divmod(np.arange(24), 4)
    cells = jnp.asarray(np.stack([rows, columns], axis=-1))[None]
    squares = np.asarray(windows.partition(cells, grid, side, shift))  # original coordinates of each row
    near = np.abs(squares[:, :, None] - squares[:, None]).max(axis=-1) < side
    np.testing.assert_array_equal(windows.shift_mask(grid, side, shift) == 0, near)
