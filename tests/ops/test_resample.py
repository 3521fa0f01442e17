import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.ops import resample


def test_bilinear_doubling_literal():
    # torch.nn.functional.interpolate([0, 4], scale_factor=2, mode="linear"): 0, 1, 3, 4
    np.testing.assert_allclose(resample.resize_matrix(2, 4, "bilinear") @ [0.0, 4.0], [0, 1, 3, 4])


def test_bicubic_has_torchs_coefficient():
    # Half-way between two samples Keys' kernel gives a/8 to the far ones: -0.75 / 8.
    row = resample.resize_matrix(8, 16, "bicubic")[8]  # centre 3.75: taps at distances 1.75, .75, .25, 1.25
    d = np.array([1.75, 0.75, 0.25, 1.25])
    a = -0.75
    expected = np.where(d <= 1, (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4))
    np.testing.assert_allclose(row[2:6], expected, atol=1e-12)


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("old", "new"), [(4, 6), (8, 5), (14, 24), (24, 14), (7, 7)])
def test_rows_sum_to_one(method, old, new):
    np.testing.assert_allclose(resample.resize_matrix(old, new, method).sum(axis=1), 1.0, atol=1e-12)


def test_resize_of_a_non_square_grid_keeps_constants_and_shape():
    y = resample.resize_grid(jnp.full((1, 12, 2), 3.0), (3, 4), (5, 2))
    assert y.shape == (1, 10, 2)
    np.testing.assert_allclose(y, 3.0, rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="do not fill a grid"):
        resample.resize_grid(jnp.zeros((1, 5, 2)), (2, 2), (3, 3))
    with pytest.raises(ValueError, match="choose bicubic, bilinear, timm"):
        resample.resize_grid(jnp.zeros((1, 4, 2)), (2, 2), (3, 3), "nearest")


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 3)), ((5, 6), (2, 11)), ((37, 37), (16, 16))])
def test_official_dinov2_scales_by_a_factor_of_its_own(old, new):
    """Bicubic by (n + 0.1) / N, as its code calls torch; the plain rule is another one."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(1, old[0] * old[1], 2)).astype(np.float32)
    grid = torch.tensor(x.reshape(1, *old, 2).transpose(0, 3, 1, 2))
    factors = tuple((n + 0.1) / o for n, o in zip(new, old, strict=True))
    theirs = torch.nn.functional.interpolate(grid, scale_factor=factors, mode="bicubic")
    assert theirs.shape[2:] == new
    ours = np.asarray(resample.resize_grid(x, old, new, "dinov2")).reshape(*new, 2)
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), atol=2e-5)
    assert not np.allclose(ours, np.asarray(resample.resize_grid(x, old, new)).reshape(*new, 2), atol=1e-3)
