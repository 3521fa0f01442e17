"""Rotary positions: angles in numbers, and what a rotation leaves alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.ops.rope import Rope


def test_patch_centres_turn_by_halves():
    """Rows of a 1 x 2 grid lie at y = 0 and x = -1/2, 1/2; of two frequencies, 1 and 1/10, each axis has both."""
    rope = Rope(8, "centred", "halves", 100.0)
    angles = np.pi * np.array([[0, 0, -1, -0.1], [0, 0, 1, 0.1]])
    np.testing.assert_allclose(rope.angles((1, 2)), np.tile(angles, 2), atol=1e-12)
    x = np.zeros((1, 1, 2, 8), np.float32)
    x[..., 2] = 1.0  # its partner is channel 6
    turned = np.asarray(rope.whole((1, 2), 0)(jnp.asarray(x)))
    np.testing.assert_allclose(turned[0, 0, 0], [0, 0, -1, 0, 0, 0, 0, 0], atol=1e-6)


def test_patch_numbers_turn_by_pairs():
    """Numbers of a 2 x 4 grid on the 4 x 4 of pretraining: rows 0 and 2, columns 0 to 3."""
    rope = Rope(8, "index", "pairs", 10000.0, (4, 4))
    angles = rope.angles((2, 4))
    np.testing.assert_allclose(angles[6], [2, 2, 0.02, 0.02, 2, 2, 0.02, 0.02], atol=1e-12)
    x = jnp.zeros((1, 1, 8, 8)).at[..., 0].set(1.0)
    turned = np.asarray(rope.whole((2, 4), 0)(x))[0, 0, 6]
    np.testing.assert_allclose(turned, [np.cos(2), np.sin(2), 0, 0, 0, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("layout", ["halves", "pairs"])
def test_products_depend_on_the_way_between_patches_alone(layout):
    rope = Rope(8, "index", layout, 100.0)
    q, k = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    every = np.broadcast_to(np.stack([q, k])[:, None, None], (2, 1, 12, 8))
    q, k = rope.whole((3, 4), 0)(jnp.asarray(every))[:, 0]
    products = (np.asarray(q) @ np.asarray(k).T).reshape(3, 4, 3, 4)
    np.testing.assert_allclose(products[0, 0, 1, 2], products[1, 1, 2, 3], atol=1e-5)
    assert abs(products[0, 0, 1, 2] - products[0, 0, 2, 1]) > 1e-3


def test_rows_keep_their_rotation():
    """Prefix rows and those of no place stay; a moved row takes its own angles along, bit for bit."""
    rope = Rope(8, "centred", "halves", 100.0)
    whole = rope.whole((2, 3), 2)
    x = np.random.default_rng(1).normal(size=(2, 1, 8, 8)).astype(np.float32)
    turned = np.asarray(whole(jnp.asarray(x)))
    np.testing.assert_array_equal(turned[:, :, :2], x[:, :, :2])
    rows = np.array([[0, 1, 7, 3, -1], [0, 1, 2, 6, -1]], np.int32)
    picked = np.stack([image[:, row] for image, row in zip(x, rows, strict=True)])
    moved = np.asarray(whole.of(jnp.asarray(rows), 0)(jnp.asarray(picked)))
    for image in range(2):
        np.testing.assert_array_equal(moved[image, 0, :4], turned[image, 0, rows[image, :4]])
        np.testing.assert_array_equal(moved[image, 0, 4], picked[image, 0, 4])
    assert whole.of(None, 0) is whole
    more = whole.of(None, 1)
    assert more.cos.shape == (1, 1, 9, 4) and not more.sin[0, 0, 8].any() and (more.cos[0, 0, 8] == 1).all()


def test_low_precision_rows_turn_in_float32():
    whole = Rope(8, "index", "pairs", 100.0).whole((1, 64), 0)
    x = np.random.default_rng(2).normal(size=(1, 1, 64, 8)).astype(np.float32)
    low = jnp.asarray(x, jnp.bfloat16)
    turned = whole(low)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, whole(low.astype(jnp.float32)).astype(jnp.bfloat16))


def test_a_head_has_both_axes_twice():
    with pytest.raises(ValueError, match=r"heads of 4, 8, \.\.\. channels, not 6"):
        Rope(6, "index", "pairs", 100.0)
