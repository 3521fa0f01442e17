"""Sampling between pixels: values, the fading rim, gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.ops import bilinear

MAP = jnp.asarray([[0.0, 1.0, 4.0], [2.0, 3.0, 8.0]])[None, :, :, None]  # [1, 2, 3, 1]


def _at(*points):
    return jax.jit(bilinear.sample)(MAP, jnp.asarray([points], jnp.float32))[0, :, 0]


def test_integers_are_pixel_centres_and_the_rim_fades():
    np.testing.assert_allclose(_at((1, 2), (0.5, 0.5), (0, 1.25)), [8, 1.5, 1.75])
    np.testing.assert_allclose(_at((-0.25, 1), (1.75, 2), (0.5, 2.5)), [0.75, 2.0, 3.0])
    np.testing.assert_array_equal(_at((-1, 0), (2, 0), (0, -1), (0, 3), (9, 9), (-9, 1)), 0)


def test_gradients_inside_are_the_exact_ones():
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(1, 5, 6, 4)), jnp.float32)
    points = jnp.asarray(rng.uniform(0.1, 3.9, (1, 7, 2)), jnp.float32)
    upstream = jnp.asarray(rng.normal(size=(1, 7, 4)), jnp.float32)

    def hats(features, points):  # the same sum over all pixels
        y, x = (
            jnp.maximum(0, 1 - jnp.abs(points[..., i, None] - jnp.arange(n)[None, None]))
            for i, n in ((0, 5), (1, 6))
        )
        return jnp.einsum("bph,bpw,bhwc->bpc", y, x, features)

    @jax.jit
    def both(features, points):
        pairs = (jax.vjp(sample, features, points) for sample in (bilinear.sample, hats))
        return [(out, *back(upstream)) for out, back in pairs]

    for ours, theirs in zip(*both(features, points), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_gradients_on_and_beyond_the_rim_are_the_kernels():
    gradient = jax.jit(jax.grad(lambda f, p: bilinear.sample(f, p).sum(), argnums=(0, 1)))
    at = lambda y, x: [np.asarray(g) for g in gradient(MAP, jnp.asarray([[[y, x]]], jnp.float32))]  # noqa: E731
    features, point = at(-0.5, 1.0)  # counted at y = 0
    np.testing.assert_array_equal(features[0, :, :, 0], [[0, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(
        point[0, 0], [2, -0.5 * 5 + 1.5 * 3]
    )  # slope along x, extrapolated to y = -0.5
    features, point = at(1.0, 0.5)  # the last row: nothing along x
    np.testing.assert_array_equal(features[0, :, :, 0], [[0, 0, 0], [0.5, 0.5, 0]])
    np.testing.assert_array_equal(point[0, 0], [0, 0])
    features, point = at(-1.5, 1.0)
    assert not features.any() and not point.any()
