"""Crops, flips and resampling against values worked out by hand and Pillow."""

import numpy as np
import pytest

from dyntoken import data
from dyntoken.data import augment, hash_rng, resample
from dyntoken.data.augment import AugmentOptions

ZERO = np.zeros(1, int)


def ramp(height, width):
    return np.arange(height * width, dtype=np.uint8).reshape(1, height, width, 1)


@pytest.mark.parametrize(
    "kernel, source, target, row, expected",
    [
        ("bilinear", 4, 2, 0, [3 / 7, 3 / 7, 1 / 7, 0]),
        ("bilinear", 2, 4, 1, [0.75, 0.25]),
        ("bilinear", 2, 4, 0, [1, 0]),
        ("bicubic", 2, 4, 1, [0.8671875 / 1.09375, 0.2265625 / 1.09375]),
        ("bicubic", 3, 3, 1, [0, 1, 0]),
    ],
)
def test_weights_by_hand(kernel, source, target, row, expected):
    matrix = resample.weights(ZERO, ZERO + source, source, target, kernel)
    assert matrix.shape == (1, target, source) and matrix.dtype == np.float32
    np.testing.assert_allclose(matrix[0, row], expected, atol=1e-6)


def test_weights_of_a_crop_do_not_see_outside():
    matrix = resample.weights(ZERO + 2, ZERO + 4, 9, 2, "bilinear")[0]
    np.testing.assert_allclose(matrix[0], [0, 0, 3 / 7, 3 / 7, 1 / 7, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(matrix[1], [0, 0, 0, 1 / 7, 3 / 7, 3 / 7, 0, 0, 0], atol=1e-6)


def test_resize_boxes_at_full_resolution_is_a_crop():
    images = np.concatenate([ramp(5, 6), ramp(5, 6)])
    boxes = np.array([[1, 2, 3, 4], [2, 0, 3, 4]])
    out = resample.resize_boxes(images, boxes, (3, 4), "bicubic", np.array([False, True]))
    np.testing.assert_array_equal(out[0, :, :, 0], [[8, 9, 10, 11], [14, 15, 16, 17], [20, 21, 22, 23]])
    np.testing.assert_array_equal(out[1, :, :, 0], [[15, 14, 13, 12], [21, 20, 19, 18], [27, 26, 25, 24]])


def test_resize_by_hand():
    row = np.array([0, 70, 140, 210], np.uint8).reshape(1, 1, 4, 1)
    out = resample.resize_boxes(row, np.array([[0, 0, 1, 4]]), (1, 2), "bilinear")
    np.testing.assert_array_equal(out.ravel(), [50, 160])  # 30 + 20, and its mirror image


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "box, size", [((3, 5, 17, 20), (11, 13)), ((0, 0, 28, 30), (45, 50)), ((9, 2, 4, 6), (24, 24))]
)
def test_resize_boxes_as_pillow(kernel, box, size):
    image = pytest.importorskip("PIL.Image")
    pixels = (
        (hash_rng.bits(3, np.arange(28 * 30 * 3)) % np.uint64(256)).astype(np.uint8).reshape(1, 28, 30, 3)
    )
    top, left, height, width = box
    crop = image.fromarray(pixels[0]).crop((left, top, left + width, top + height))
    expected = np.asarray(crop.resize(size[::-1], getattr(image.Resampling, kernel.upper()))).astype(int)
    out = resample.resize_boxes(pixels, np.array([box]), size, kernel)[0].astype(int)
    assert np.abs(out - expected).max() <= 1
    assert (out != expected).mean() < 0.03  # ties that Pillow's fixed point rounds the other way


@pytest.mark.parametrize(
    "source, size, crop_pct, expected",
    [
        ((480, 640), (224, 224), 0.875, (256, 341)),
        ((640, 480), (224, 224), 0.875, (341, 256)),
        ((28, 28), (32, 32), 1.0, (32, 32)),
        ((100, 100), (50, 80), 1.0, (80, 80)),
    ],
)
def test_covering_size(source, size, crop_pct, expected):
    assert resample.covering_size(*source, size, crop_pct) == expected


def test_resize_centre_takes_the_middle():
    out = resample.resize_centre(ramp(4, 8), (4, 4), 1.0, "bicubic")
    np.testing.assert_array_equal(out[0, 0, :, 0], [2, 3, 4, 5])
    np.testing.assert_array_equal(out[0, 3, :, 0], [26, 27, 28, 29])


def test_resize_is_independent_of_the_batch():
    images = np.repeat(ramp(8, 8), 70, axis=0)
    images[33] = 255 - images[33]
    boxes = np.tile([1, 2, 5, 4], (70, 1))
    whole = resample.resize_boxes(images, boxes, (7, 9), "bicubic")
    np.testing.assert_array_equal(
        whole[33:34], resample.resize_boxes(images[33:34], boxes[:1], (7, 9), "bicubic")
    )


def test_pad_crop_by_hand():
    images = np.repeat(ramp(3, 3), 4, axis=0)  # 0 1 2 / 3 4 5 / 6 7 8
    offsets = np.array([[1, 1], [0, 0], [2, 1], [1, 1]])
    flip = np.array([False, False, False, True])
    zero = augment.pad_crop(images, offsets, 1, "zero", flip)[..., 0]
    np.testing.assert_array_equal(zero[0], [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(zero[1], [[0, 0, 0], [0, 0, 1], [0, 3, 4]])
    np.testing.assert_array_equal(zero[2], [[3, 4, 5], [6, 7, 8], [0, 0, 0]])
    np.testing.assert_array_equal(zero[3], [[2, 1, 0], [5, 4, 3], [8, 7, 6]])
    reflect = augment.pad_crop(images, offsets, 1, "reflect", flip)[..., 0]
    np.testing.assert_array_equal(reflect[1], [[4, 3, 4], [1, 0, 1], [4, 3, 4]])
    np.testing.assert_array_equal(reflect[2], [[3, 4, 5], [6, 7, 8], [3, 4, 5]])


@pytest.mark.parametrize("mode, numpy_mode", [("zero", "constant"), ("reflect", "reflect")])
def test_pad_crop_as_numpy_pad(mode, numpy_mode):
    images = np.repeat(ramp(5, 7), 3, axis=0)
    offsets = np.array([[0, 6], [6, 0], [2, 5]])
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode=numpy_mode)
    out = augment.pad_crop(images, offsets, 3, mode)
    for i, (top, left) in enumerate(offsets):
        np.testing.assert_array_equal(out[i], padded[i, top : top + 5, left : left + 7])


def test_random_boxes_by_hand():
    draws = np.full((2, 22), 0.5)
    draws[0, :10] = [1.0 - 1e-9, *[0.25] * 9]  # whole area first: does not fit with ratio 2
    draws[0, 10:20] = 1.0
    draws[0, 20:] = [0.5, 1.0 - 1e-9]
    boxes = augment.random_boxes(draws, 40, 40, (0.0001, 1.0), (0.5, 2.0))
    # 0.25 * 1600 = 400 at ratio 2: 28 wide, 14 high; tops 0..26, lefts 0..12.
    np.testing.assert_array_equal(boxes[0], [13, 12, 14, 28])
    np.testing.assert_array_equal(boxes[1], [6, 6, 28, 28])  # 800 at ratio 1


def test_random_boxes_fall_back_to_the_centre():
    draws = np.full((1, 22), 0.999)
    boxes = augment.random_boxes(draws, 10, 30, (0.9, 1.0), (3 / 4, 4 / 3))
    np.testing.assert_array_equal(boxes, [[0, 8, 10, 13]])
    boxes = augment.random_boxes(draws, 30, 10, (0.9, 1.0), (3 / 4, 4 / 3))
    np.testing.assert_array_equal(boxes, [[8, 0, 13, 10]])
    boxes = augment.random_boxes(draws, 10, 11, (1.1, 1.1), (3 / 4, 4 / 3))
    np.testing.assert_array_equal(boxes, [[0, 0, 10, 11]])


def test_random_boxes_have_the_stated_distribution():
    draws = hash_rng.uniform(0, np.arange(5000)[:, None], np.arange(22)[None])
    boxes = augment.random_boxes(draws, 200, 200, (0.08, 1.0), (3 / 4, 4 / 3))
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (height > 0).all() and (width > 0).all()
    assert (top + height <= 200).all() and (left + width <= 200).all()
    share, ratio = height * width / 40000, width / height
    assert 0.07 < share.min() < 0.1 and share.max() > 0.95
    assert 0.70 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.4
    np.testing.assert_allclose(np.log(ratio).mean(), 0.0, atol=0.01)


def test_flip_rate_and_symmetry():
    images, ids = np.repeat(ramp(3, 3), 2000, axis=0), np.arange(2000)
    options = AugmentOptions(crop="none", flip=0.3)
    out = augment.augment(images, ids, 0, 0, (3, 3), options)
    flipped = (out == images[:, :, ::-1]).all((1, 2, 3))
    kept = (out == images).all((1, 2, 3))
    assert (flipped ^ kept).all()
    np.testing.assert_allclose(flipped.mean(), 0.3, atol=0.03)


def test_augment_depends_on_the_example_not_on_its_place():
    images, ids = np.repeat(ramp(8, 8), 6, axis=0), np.array([5, 9, 2, 7, 11, 3])
    for options in (AugmentOptions(), AugmentOptions(crop="pad")):
        whole = augment.augment(images, ids, 1, 2, (8, 8), options)
        back = augment.augment(images, ids[::-1], 1, 2, (8, 8), options)
        np.testing.assert_array_equal(whole, back[::-1])
        assert len({i.tobytes() for i in whole}) > 3


def test_options():
    assert AugmentOptions.of(None) == AugmentOptions(crop="none", flip=0.0)
    assert AugmentOptions.of({"flip": True, "scale": [0.5, 1]}) == AugmentOptions(flip=0.5, scale=(0.5, 1.0))
    assert AugmentOptions(flip=False).flip == 0.0
    hash(AugmentOptions.of({"ratio": [1, 1]}))


def test_colour_options():
    deit = AugmentOptions(rand_augment="rand-m9-mstd0.5-inc1")
    made = deit.distortion((0.485, 0.456, 0.406))
    assert made.width == 10 and made.fill == (124, 116, 104) and made.policy.magnitude == 9
    assert AugmentOptions(color_jitter=0.4).distortion((0.5,)).width == 4
    assert AugmentOptions().distortion((0.5,)) is None
    for options, message in (
        ({"rand_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4}, "exclude each other"),
        ({"color_jitter": -1}, "color_jitter is -1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"repeats": 1.5}, "repeats is 1.5"),
    ):
        with pytest.raises(data.DataError, match=message):
            AugmentOptions(**options)
    with pytest.raises(data.DataError, match="1 or 3 channels, not 2"):
        deit.distortion((0.5, 0.5))
