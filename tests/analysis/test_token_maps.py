"""What the pictures show, read back from fates and pixels."""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.analysis import figures, token_maps
from dyntoken.types import Reduction

# Nine patches. Rows after the site stand at cells 4, 0, 8; patches 1 and 2 went to cell 4, patch 3 to 0, the
# rest was dropped.
CARRIER = [1, 0, 0, 1, 0, -1, -1, -1, 2]


def reduction(carrier, place, grid=(3, 3)):
    unused = jnp.zeros((1, 1))
    return Reduction(
        scores=unused,
        decision=unused,
        host=unused,
        remap=unused,
        place=jnp.asarray([place]),
        carrier=jnp.asarray([carrier]),
        grid=grid,
    )


def test_fate_of_absorbed_and_dropped_patches():
    fate = token_maps.fate(reduction(CARRIER, [4, 0, 8]))
    assert fate.kept.tolist() == [True, False, False, False, True, False, False, False, True]
    assert fate.host.tolist() == [0, 4, 4, 0, 4, -1, -1, -1, 8]
    assert np.nonzero(fate.absorbed)[0].tolist() == [1, 2, 3]
    assert np.nonzero(fate.dropped)[0].tolist() == [5, 6, 7]
    assert fate.summary() == "3 of 9 patches kept, 3 absorbed by 2 hosts, 3 dropped"


def test_the_mask_form_tells_the_same():
    gather = token_maps.fate(reduction(CARRIER, [4, 0, 8]))
    mask = token_maps.fate(reduction([0, 4, 4, 0, 4, -1, -1, -1, 8], range(9)))  # every row stays at its cell
    assert mask.host.tolist() == gather.host.tolist()
    assert mask.kept.tolist() == gather.kept.tolist()


def test_fate_of_fused_patches():
    fate = token_maps.fate(reduction([0, 1, 2, 2, 2, 2, 2, 2, 2], [0, 1, -1]))
    assert fate.fused.tolist() == [False] * 2 + [True] * 7
    assert not fate.absorbed.any() and not fate.dropped.any()
    assert fate.summary() == "2 of 9 patches kept, 7 in 1 fused token"


def test_a_reduction_without_addresses_is_refused():
    bare = reduction(CARRIER, [4, 0, 8]).replace(carrier=None)
    with pytest.raises(ValueError, match="has no carrier"):
        token_maps.fate(bare)


def test_kept_patches_keep_their_pixels_and_others_fade():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    rgb = figures.to_rgb(image)
    pale = token_maps.faded(rgb, token_maps.fate(reduction(CARRIER, [4, 0, 8])))
    for cell in range(9):
        rows, columns = (slice(2 * n, 2 * n + 2) for n in divmod(cell, 3))
        same = (pale[rows, columns] == rgb[rows, columns]).all()
        assert same == (cell in (0, 4, 8))
    gone = pale[0:2, 2:6]
    assert np.ptp(gone, axis=-1).max() < 1e-6  # grey
    assert gone.min() > 0.75


@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 1), (6, 6, 3)])
def test_grey_and_colour_become_rgb(shape):
    rgb = figures.to_rgb(np.full(shape, 51, np.uint8))
    assert rgb.shape == (6, 6, 3)
    np.testing.assert_allclose(rgb, 0.2, atol=1e-6)
    np.testing.assert_allclose(figures.to_rgb(np.full(shape, 0.2, np.float32)), rgb, atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match=r"got \(2, 2, 4\)"):
        figures.to_rgb(np.zeros((2, 2, 4)))
    with pytest.raises(ValueError, match="reduces no tokens"):
        token_maps.picture(np.zeros((6, 6)), ())


def titles(figure):
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def test_panels_of_stages_with_grids_of_their_own():
    stages = [reduction(CARRIER, [4, 0, 8]), reduction([0, 0, 0, -1], [0], (2, 2))]
    figure = token_maps.picture(np.zeros((6, 6), np.uint8), stages, at=(0, 1), noun="stage")
    assert titles(figure)[1:3] == ["stage 0: 3 of 9 kept", "stage 1, 2 x 2: 1 of 4 kept"]


def test_panels_of_a_squeezing_method():
    stages = [reduction(CARRIER, [4, 0, 8]), reduction([0, 0, 0, 0, 0, -1, -1, -1, 0], [4])]
    figure = token_maps.picture(np.zeros((6, 6), np.uint8), stages, at=(2, 5), title="a picture")
    assert titles(figure) == [
        "input: 3 x 3 = 9 patches",
        "block 2: 3 of 9 kept",
        "block 5: 1 of 9 kept",
        "3 absorbed by 2 hosts, 3 dropped",
        "5 absorbed by 1 host, 3 dropped",
    ]
    assert figure.get_suptitle() == "a picture"
    legend = figure.axes[3].texts[0].get_text()
    assert "line = a patch absorbed by it" in legend and "orange" not in legend
    ties, dots = figure.axes[4].collections[-2:]
    assert len(ties.get_segments()) == 3
    assert sorted(map(tuple, dots.get_offsets().tolist())) == [(0.5, 0.5), (1.5, 1.5)]


def test_a_dropping_method_needs_no_second_row():
    figure = token_maps.picture(np.zeros((6, 6)), [reduction([0, -1, -1, -1, 1, -1, -1, -1, 2], [0, 4, 8])])
    assert titles(figure) == ["input: 3 x 3 = 9 patches", "stage 1: 3 of 9 kept"]


def test_save_writes_a_picture_of_the_figures_size(tmp_path):
    image = pytest.importorskip("PIL.Image")
    # Two rows of two panels, non-square: 2 x 3 patches.
    squeezed = reduction([0, 0, 0, 1, 1, 1], [0, 3], grid=(2, 3))
    figure = token_maps.picture(np.zeros((8, 12, 3)), [squeezed])
    path = tmp_path / "new" / "shown.png"
    figures.save(figure, path, dpi=50)
    with image.open(path) as written:
        assert written.size == tuple(int(50 * inches) for inches in figure.get_size_inches())


def test_matplotlib_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install matplotlib"):
        token_maps.picture(np.zeros((6, 6)), [reduction(CARRIER, [4, 0, 8])])
