"""Baselines that look at no image: pooling of the grid, and one learnt mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.reducers import make_reducer
from dyntoken.types import Tokens

SMALL = {"width": 16, "depth": 4, "heads": 2, "num_classes": 5, "patch_size": 4}


def _tokens(grid, batch=2):
    rows = 1 + grid[0] * grid[1]
    x = jnp.arange(batch * rows, dtype=jnp.float32).reshape(batch, rows, 1)
    return Tokens.start(jnp.concatenate([x, x**2], axis=-1), grid=grid)


def test_pooling_takes_the_mean_of_squares():
    tokens, reduction = make_reducer("pooling", keep=4)(_tokens((4, 3), batch=1))
    # rows 1 .. 12 on the grid [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    np.testing.assert_array_equal(tokens.x[0, :, 0], [0, 3, 4.5, 9, 10.5])
    np.testing.assert_array_equal(tokens.place, [[0, 2, 6, 8]])
    np.testing.assert_array_equal(tokens.size, [[4, 2, 4, 2]])
    np.testing.assert_array_equal(reduction.carrier, [[0, 0, 1, 0, 0, 1, 2, 2, 3, 2, 2, 3]])


@pytest.mark.thorough
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_pooling_twice_is_the_same_in_both_forms(grid):
    kept = masked = _tokens(grid)
    counts = {(4, 4): (4, 1), (3, 5): (6, 2)}[grid]
    for stage, keep in enumerate(counts):
        kept = make_reducer("pooling", keep=keep, form="gather", stage=stage)(kept)[0]
        masked = make_reducer("pooling", keep=keep, form="mask", stage=stage)(masked)[0]
        alive = np.asarray(masked.alive[0]) > 0.5
        np.testing.assert_allclose(masked.patches[:, alive], kept.patches, rtol=1e-6)
        np.testing.assert_array_equal(masked.place[:, alive], kept.place)
        np.testing.assert_array_equal(masked.size[:, alive], kept.size)
        np.testing.assert_array_equal(masked.size[:, ~alive], 0)


def test_pooling_has_one_site_by_default_and_its_own_counts():
    model = dyntoken.create_model("pooling_deit_small_patch16_224")
    assert model.at == (6,) and [site.reducer["keep"] for site in model.sites()] == [49]
    twice = model.clone(at=(3, 9))
    assert [site.reducer["keep"] for site in twice.sites()] == [49, 16]
    rounded = dyntoken.create_model("pooling_deit_tiny_patch16_224", **SMALL, img_size=16, keep_round_to=4)
    with pytest.raises(ValueError, match="leaves 4 of 16 tokens, not 3: leave keep_round_to out"):
        jax.eval_shape(rounded.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_a_static_mask_keeps_the_same_patches_of_every_image():
    model = dyntoken.create_model("static_deit_tiny_patch16_224", **SMALL, img_size=16, at=(1, 2), keep=0.6)
    images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    for site in jax.jit(model.apply)(variables, images).reductions:
        np.testing.assert_array_equal(*(np.sort(site.place, axis=1)[rows] for rows in ([0, 0], [1, 2])))
