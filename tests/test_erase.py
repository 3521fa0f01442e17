"""Random erasing in pixel mode, on the normalised batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.device_augment import erase_box, mix, random_erase

AREA, ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)


@pytest.fixture(scope="module")
def erased():
    """2,000 images of 24 x 24 whose every value is 9, after erasing a quarter of them."""
    images = jnp.full((2000, 24, 24, 2), 9.0)
    return np.asarray(jax.jit(random_erase)(jax.random.key(3), images, jnp.arange(2000)))


def test_a_quarter_is_erased_with_standard_normal_noise(erased):
    gone = erased != 9.0
    assert (gone[..., 0] == gone[..., 1]).all()  # all channels of a pixel
    hit = gone.any((1, 2, 3))
    np.testing.assert_allclose(hit.mean(), 0.25, atol=0.02)
    noise = erased[gone]
    np.testing.assert_allclose([noise.mean(), noise.std()], [0.0, 1.0], atol=0.01)
    np.testing.assert_allclose((np.abs(noise) > 2).mean(), 0.0455, atol=0.002)  # nothing is cut off
    pair = erased[gone[..., 0]]
    assert abs(np.corrcoef(pair.T)[0, 1]) < 0.02  # a draw per value, not per pixel


def test_boxes_are_whole_and_of_the_stated_size(erased):
    masks = (erased != 9.0)[..., 0]
    masks = masks[masks.any((1, 2))]
    rows, columns = masks.any(2).sum(1), masks.any(1).sum(1)
    np.testing.assert_array_equal(masks.sum((1, 2)), rows * columns)
    share = rows * columns / 576
    assert 0.01 < share.min() < 0.03 and 0.3 < share.max() < 0.37
    np.testing.assert_allclose(share.mean(), (0.02 + 1 / 3) / 2, atol=0.012)
    ratio = np.log(rows / columns)
    assert abs(ratio.mean()) < 0.1 and ratio.max() < np.log(1 / 0.3) + 0.35
    assert masks[:, 0].any() and masks[:, -1].any() and masks[:, :, 0].any() and masks[:, :, -1].any()


def test_box_by_hand():
    draws = np.zeros(23, np.float32)
    draws[:10] = [1.0, *[0.5] * 9]  # areas: a third, then 0.17667
    draws[10:20] = [1.0, *[0.5] * 9]  # height / width: 3.333, then 1
    draws[20:] = [0.5, 0.99999, 0.2]
    box = [int(v) for v in erase_box(jnp.asarray(draws), 20, 30, prob=0.25, area=AREA, aspect=ASPECT)]
    # 200 pixels at 3.333 are 26 high: too high. 106 pixels, square: 10 x 10; tops 0..10, lefts 0..20.
    assert box == [5, 20, 10, 10]
    draws[-1] = 0.25
    assert [int(v) for v in erase_box(jnp.asarray(draws), 20, 30, prob=0.25, area=AREA, aspect=ASPECT)][
        2:
    ] == [
        0,
        0,
    ]


def test_erasing_depends_on_the_global_position_only():
    key, images, ids = jax.random.key(1), jnp.ones((16, 12, 12, 3)), jnp.arange(16)
    erase = jax.jit(functools.partial(random_erase, prob=0.9))
    whole = erase(key, images, ids)
    halves = [erase(key, images[half], ids[half]) for half in (slice(0, 8), slice(8, 16))]
    np.testing.assert_array_equal(whole, jnp.concatenate(halves))
    assert len({np.asarray(image).tobytes() for image in whole}) > 12


def test_mix_erases_before_it_mixes():
    images, labels = jnp.full((8, 12, 12, 3), 5.0), jnp.zeros(8, jnp.int32)
    options = {"num_classes": 2, "mixup": 0.8, "cutmix": 0.0, "smoothing": 0.0}
    both = jax.jit(functools.partial(mix, erase=1.0, **options))
    out, _ = both(jax.random.key(0), images, labels, jnp.arange(8))
    changed = (np.abs(np.asarray(out) - 5.0) > 1e-4).any(-1)  # equal images: mixing alone changes nothing
    assert (changed[0] == changed[1]).all() and changed.any()
    still, targets = jax.jit(functools.partial(mix, **options))(jax.random.key(0), images, labels)
    np.testing.assert_allclose(still, images, atol=1e-5)
    np.testing.assert_allclose(targets, [[1.0, 0.0]] * 8)
    with pytest.raises(ValueError, match=r"erase=0\.25 draws per image"):
        mix(jax.random.key(0), images, labels, erase=0.25, **options)
    with pytest.raises(ValueError, match=r"mix\.erase is 1\.5"):
        mix(jax.random.key(0), images, labels, erase=1.5, **options)
