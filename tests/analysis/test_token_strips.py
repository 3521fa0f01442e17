"""Strips: which score stood for a patch, colours of groups, panels."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.analysis import figures, token_maps, token_strips
from dyntoken.types import Reduction

pytest.importorskip("matplotlib")

GRID = (2, 3)
# Six patches: 0 absorbs 1 and 2, 3 stays, 4 and 5 go into a fused row.
FIRST = {"carrier": [0, 0, 0, 1, 2, 2], "place": [0, 3, -1], "scores": [0.9, 0.1, 0.2, 0.8, 0.0, 0.3]}
SECOND = {"carrier": [0, 0, 0, -1, 1, 1], "place": [0, -1], "scores": [0.7, 0.4, -np.inf]}


def reduction(carrier, place, scores):
    unused = jnp.zeros((1, 1))
    arrays = {"carrier": jnp.asarray([carrier]), "place": jnp.asarray([place])}
    return Reduction(
        scores=jnp.asarray([scores], jnp.float32),
        decision=unused,
        host=unused,
        remap=unused,
        grid=GRID,
        **arrays,
    )


STAGES = [reduction(**FIRST), reduction(**SECOND)]
RGB = np.stack(np.broadcast_arrays(np.arange(6).reshape(1, 6) / 10, 0.5, np.zeros((4, 1))), axis=-1)


def test_a_patch_has_the_score_of_the_row_that_stood_for_it():
    first, second = token_strips.scores_of(STAGES)
    np.testing.assert_allclose(first, [0.9, 0.1, 0.2, 0.8, 0.0, 0.3], rtol=1e-6)
    np.testing.assert_allclose(second, [0.7, 0.7, 0.7, 0.4, np.nan, np.nan], rtol=1e-6)
    every_row_stays = reduction([0, 0, -1, 3, -1, -1], range(6), SECOND["scores"] + [1, 2, 3])
    _, masked = token_strips.scores_of([STAGES[0], every_row_stays])
    np.testing.assert_allclose(masked, [0.7, 0.4, np.nan, 1, 2, 3], rtol=1e-6)


def test_ranks_and_heat():
    np.testing.assert_allclose(
        token_strips.level(np.array([3.0, np.nan, 1.0, 1.0, 2.0])), [1.0, 0.0, 0.0, 0.0, 0.5]
    )
    seen = token_strips.heat(RGB, np.array([1.0, np.nan, 2.0, 3.0, 4.0, 5.0]), GRID)
    np.testing.assert_allclose(seen[0, 2], RGB[0, 2].mean())  # no score: the image in grey
    assert seen[3, 5].sum() > seen[0, 0].sum()


def test_groups_have_the_mean_colour_of_their_pixels():
    fate = token_maps.fate(STAGES[0])
    assert fate.summary() == "2 of 6 patches kept, 2 absorbed by 1 host, 2 in 1 fused token"
    np.testing.assert_allclose(token_strips.cells(RGB, GRID)[:, 0], [0.05, 0.25, 0.45] * 2)
    means = token_strips.means(RGB, fate)
    np.testing.assert_allclose(means[:, 0], [0.25, 0.25, 0.25, 0.05, 0.35, 0.35])
    assert list(token_strips.largest(fate)) == [0]
    assert token_strips.who(fate) == "one token: up to 3 patches"
    left = token_strips.left_over(RGB, fate)
    np.testing.assert_allclose(left[0, :2], RGB[0, :2])
    np.testing.assert_allclose(left[0, 2], 0.24 * RGB[0, 2] + 0.76 * token_maps.PAPER)


def test_a_strip_has_a_row_per_image_and_at_most_three_stages(tmp_path):
    short = token_strips.row(RGB, STAGES, ["block 1", "block 2"], label="a", name="x", caption="cat, 90 %")
    long = token_strips.row(np.zeros((6, 6)), [STAGES[0]] * 7, [f"block {n}" for n in range(7)])
    figure = token_strips.strip([short, long], title="two")
    words = [text.get_text() for text in figure.texts]
    assert len(figure.axes) == 5 + 6
    assert "cat, 90 %" in words and "a" in words and "two" in words
    assert [w for w in words if w.startswith("block")] == [
        "block 1: 2 kept + 1 fused",
        "block 2: 1 kept + 1 fused",
        *(f"block {n}: 2 kept + 1 fused" for n in (0, 3, 6)),
    ]
    without = [reduction([0, 0, 0, 1, 1, 1], [0, 3], FIRST["scores"])]
    figure = token_strips.strip([token_strips.row(RGB, without, ["block 4"])])
    assert "block 4: 2 of 6 kept" in [text.get_text() for text in figure.texts]
    figures.save(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="nothing to draw"):
        token_strips.strip([])
