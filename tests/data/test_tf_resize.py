"""The compiled resizing of tf.data against Pillow's, which goes over columns first."""

import numpy as np
import pytest

pytest.importorskip("tensorflow")
PIL = pytest.importorskip("PIL.Image")
cbook = pytest.importorskip("matplotlib.cbook")

SIZE = (40, 40)  # of most: a program is compiled for each


@pytest.fixture(scope="module")
def photo():
    """Rear Admiral Hopper, 600 pixels high and 512 wide, uint8 `[h, w, 3]`."""
    with PIL.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        return np.asarray(image.convert("RGB"))


def ours(image, boxes, size, interpolation, flip=False, **options):
    import tensorflow as tf

    from dyntoken.data.tf_resize import pad_to_windows, plan_windows, resize

    windows = plan_windows(
        tf.constant(boxes, tf.int32), tf.constant(image.shape[:2]), size, interpolation, **options
    )
    image = pad_to_windows(tf.constant(image), windows)
    return [resize(image, window, size, interpolation, flip).numpy() for window in windows]


def pillows(image, size, interpolation):
    made = PIL.fromarray(image.squeeze()).resize(size[::-1], getattr(PIL.Resampling, interpolation.upper()))
    return np.asarray(made).reshape(*size, -1)


def assert_close(made, expected):
    assert made.shape == expected.shape and made.dtype == np.uint8
    difference = np.abs(made.astype(int) - expected.astype(int))
    assert difference.mean() < 0.5 and np.quantile(difference, 0.999) <= 3


@pytest.mark.thorough
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_boxes_as_pillow_resizes_them(photo, interpolation, channels):
    """Enlarged, as it is, reduced little, much and beyond the longest sum; at the corners and as a whole."""
    image = photo[..., :channels]
    boxes = [(30, 50, 13, 20), (100, 200, 40, 40), (0, 0, 75, 90), (470, 400, 130, 112), (0, 0, 600, 512)]
    for (top, left, tall, wide), made in zip(boxes, ours(image, boxes, SIZE, interpolation), strict=True):
        expected = pillows(image[top : top + tall, left : left + wide], SIZE, interpolation)
        assert_close(made, expected)


def test_flip_and_sides_of_unlike_scale(photo):
    box = (20, 10, 64, 480)  # enlarged to the height, reduced ten times to the width
    expected = pillows(photo[20:84, 10:490], (96, 48), "bicubic")
    (made,) = ours(photo, [box], (96, 48), "bicubic", flip=True)
    assert_close(made, expected[:, ::-1])


def test_part_of_a_resized_image(photo):
    """What evaluation does: resize to 75 x 64, take the middle."""
    scale, first = np.float32([8, 8]), np.float32([17, 12])
    (made,) = ours(photo, [(0, 0, 600, 512)], SIZE, "bicubic", scale=scale, first=first)
    assert_close(made, pillows(photo, (75, 64), "bicubic")[17:57, 12:52])


def test_pixels_outside_the_box_have_no_influence(photo):
    box = (100, 100, 90, 70)
    other = np.full_like(photo, 255)
    other[100:190, 100:170] = photo[100:190, 100:170]
    np.testing.assert_array_equal(*(ours(image, [box], SIZE, "bicubic")[0] for image in (photo, other)))


def test_small_images_and_an_equal_size(photo):
    image = pillows(photo, (12, 10), "bicubic")
    tall, wide = image.shape[:2]
    np.testing.assert_array_equal(ours(image, [(0, 0, tall, wide)], (tall, wide), "bicubic")[0], image)
    assert_close(ours(image, [(0, 0, tall, wide)], SIZE, "bicubic")[0], pillows(image, SIZE, "bicubic"))
