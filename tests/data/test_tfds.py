"""TFDS sets on disk: in memory, streamed, sliced, and what is refused."""

import gzip
import itertools

import numpy as np
import pytest

from dyntoken import data
from dyntoken.data import hash_rng, mini, resample, tfds_source
from dyntoken.data.augment import AugmentOptions, random_boxes
from scripts import prepare_data

pytest.importorskip("tensorflow")

pytestmark = [
    # TensorFlow and TFDS warn about their own dependencies when they are imported and while they write.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TRAIN, TEST, PHOTOS = 400, 103, 90


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def photo(index):
    """A smooth colour image whose size depends on its number."""
    height, width = 24 + index % 17, 24 + index * 7 % 23
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 6, x * 5, np.full_like(x, index * 2)], -1).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """A slice of the embedded images, through idx files, in TFDS layout."""
    idx_dir, data_dir = tmp_path_factory.mktemp("idx"), tmp_path_factory.mktemp("tfds")
    arrays = {}
    with np.load(mini.DATA, allow_pickle=False) as stored:
        for split, prefix, count in (("train", "train", TRAIN), ("test", "t10k", TEST)):
            images, labels = stored[f"{split}_images"][:count], stored[f"{split}_labels"][:count]
            write_idx(idx_dir / f"{prefix}-images-idx3-ubyte.gz", images[..., 0])
            write_idx(idx_dir / f"{prefix}-labels-idx1-ubyte.gz", labels)
            arrays[split] = images, labels
    flags = ["fashion_mnist", f"--source={idx_dir}", f"--data_dir={data_dir}"]
    assert prepare_data.main(flags) == 0
    assert prepare_data.main(flags) == 1  # never overwrites
    return str(data_dir), arrays


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs of differing size, 90 for training and 37 for validation."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("photos")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=200),
        }
    )
    splits = {"train": range(PHOTOS), "validation": range(PHOTOS, PHOTOS + 37)}
    tfds.dataset_builders.store_as_tfds_dataset(
        name="photos",
        version="1.0.0",
        features=features,
        split_datasets={
            key: [(i, {"image": photo(i), "label": i}) for i in ids] for key, ids in splits.items()
        },
        data_dir=data_dir,
    )
    return str(data_dir)


@pytest.fixture(params=["memory", "stream"])
def way(request, monkeypatch):
    if request.param == "stream":
        monkeypatch.setattr(tfds_source, "IN_MEMORY_BYTES", 0)
    return request.param


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(a, b):
    assert a.keys() == b.keys() == {"image", "label", "mask"}
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
        assert a[key].dtype == b[key].dtype


def test_tfds_itself_reads_what_was_prepared(fashion):
    import tensorflow_datasets as tfds

    builder = tfds.builder("fashion_mnist", data_dir=fashion[0])
    assert builder.is_prepared()
    assert builder.info.splits["train"].num_examples == TRAIN


def test_info_comes_from_the_folder(fashion):
    facts = data.info("fashion_mnist", data_dir=fashion[0])
    assert facts.splits == {"train": TRAIN, "test": TEST}
    assert facts.image_shape == (28, 28, 1) and facts.class_names[0] == "T-shirt/top"
    assert facts.mean == (0.2860,) and facts.std == (0.3530,)
    version = data.info("fashion_mnist:3.*.*", data_dir=fashion[0])
    assert version.splits == facts.splits
    with pytest.raises(data.MissingDataError, match=r"prepare_data\.py fashion_mnist"):
        data.train_batches("fashion_mnist:1.0.0", batch=8, seed=0, data_dir=fashion[0])


@pytest.mark.thorough
def test_evaluation_is_exact(fashion, way):
    images, labels = fashion[1]["test"]
    expected = sorted((int(y), x.tobytes()) for x, y in zip(images, labels, strict=True))
    request = {"batch": 16, "data_dir": fashion[0]}
    whole = list(data.eval_batches("fashion_mnist", **request))
    assert len(whole) == 7
    rows = [(int(y), x.tobytes()) for b in whole for x, y, m in zip(*b.values(), strict=True) if m]
    assert sorted(rows) == expected
    parts = [list(data.eval_batches("fashion_mnist", process=(p, 2), **request)) for p in range(2)]
    for batch, *rows in zip(whole, *parts, strict=True):
        assert_same({key: np.concatenate([r[key] for r in rows]) for key in batch}, batch)


def test_memory_equals_the_embedded_pipeline(fashion):
    images, _ = fashion[1]["train"]
    batch = np.concatenate(
        [
            b["image"]
            for b in take(data.train_batches("fashion_mnist", batch=80, seed=2, data_dir=fashion[0]), 5)
        ]
    )
    assert sorted(i.tobytes() for i in batch) == sorted(i.tobytes() for i in images)


@pytest.mark.thorough
def test_streamed_epochs_see_every_image_once(photos):
    request = {"batch": 8, "shards": 2, "seed": 0, "size": 16, "data_dir": photos}
    batches = take(data.train_batches("photos", **request), 22)
    one, two = (np.concatenate([b["label"] for b in batches[i : i + 11]]) for i in (0, 11))
    for epoch in (one, two):
        assert len(set(epoch.tolist())) == 88 and set(epoch.tolist()) <= set(range(PHOTOS))
    assert (one != two).any() and (one != np.sort(one)).any()


@pytest.mark.thorough
def test_streamed_resume_and_processes(photos):
    request = {"batch": 32, "shards": 2, "seed": 5, "size": (20, 24), "data_dir": photos, "augment": {}}
    whole = take(data.train_batches("photos", **request), 4)  # 2 steps per epoch
    assert whole[0]["image"].shape == (32, 20, 24, 3) and whole[0]["image"].dtype == np.uint8
    (resumed,) = take(data.train_batches("photos", start_step=3, **request), 1)
    assert_same(resumed, whole[3])
    rows = [next(data.train_batches("photos", process=(p, 2), start_step=1, **request)) for p in range(2)]
    assert_same({key: np.concatenate([r[key] for r in rows]) for key in rows[0]}, whole[1])
    other = next(data.train_batches("photos", **{**request, "seed": 6}))
    assert (other["image"] != whole[0]["image"]).any() and (other["label"] != whole[0]["label"]).any()


@pytest.mark.thorough
def test_streamed_repeats_through_the_shuffle_buffer(photos):
    request = {"batch": 12, "shards": 3, "seed": 1, "size": 16, "data_dir": photos, "augment": {"repeats": 3}}
    whole = take(data.train_batches("photos", **request), 7)  # one epoch: 28 slots of each shard
    labels = np.stack([b["label"] for b in whole])
    images, counts = np.unique(labels, return_counts=True)
    assert len(images) == 36 and sorted(counts) == [1] * 12 + [3] * 24  # the last group's first views
    shards = labels.reshape(7, 3, 4)
    for image in images:
        assert len(set(np.nonzero(shards == image)[1])) == 1  # read and decoded by one shard
    (resumed,) = take(data.train_batches("photos", start_step=4, **request), 1)
    assert_same(resumed, whole[4])


@pytest.mark.thorough
def test_streamed_evaluation_pads_empty_shards(photos):
    # Three examples on eight shards: five of them hold nothing.
    request = {"split": "validation[:3]", "batch": 8, "size": 16, "data_dir": photos}
    (batch,) = data.eval_batches("photos", **request)
    assert batch["mask"].sum() == 3 and len(set(batch["label"][batch["mask"] > 0])) == 3
    assert not batch["image"][batch["mask"] == 0].any()
    joined = list(data.eval_batches("photos", **{**request, "split": "train[80:]+validation"}))
    labels = np.concatenate([b["label"][b["mask"] > 0] for b in joined])
    assert len(labels) == 47 == len(set(labels.tolist()))


@pytest.mark.thorough
@pytest.mark.parametrize("encode", ["png", "jpeg"])
def test_tf_images_agree_with_numpy(encode):
    # The same resize, centre crop and rounding in both pipelines, up to one grey level.
    import tensorflow as tf

    from dyntoken.data.tf_image import eval_view, train_views

    for index in (0, 11):
        encoded = getattr(tf.io, f"encode_{encode}")(photo(index))
        pixels = tf.io.decode_image(encoded, channels=3).numpy()
        if encode == "jpeg":
            pixels = tf.image.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE").numpy()
        for size, kernel in (((18, 18), "bicubic"), ((16, 30), "bilinear"), ((40, 40), "bicubic")):
            made = eval_view(encoded, size, 3, 0.875, kernel)[0].numpy()
            expected = resample.resize_centre(pixels[None], size, 0.875, kernel)[0]
            assert np.abs(made.astype(int) - expected.astype(int)).max() <= 1
        np.testing.assert_array_equal(eval_view(encoded, pixels.shape[:2], 3, 0.875, "bicubic")[0], pixels)
        # The whole image as the only possible box, always flipped.
        ratio = pixels.shape[1] / pixels.shape[0]
        options = AugmentOptions(scale=(1, 1), ratio=(ratio, ratio), flip=1.0)
        seed = tf.constant([1, 2], tf.int64)
        (made,), bad = train_views(encoded, seed, (20, 21), 3, options)
        made = made.numpy()
        assert not bad
        box = np.array([[0, 0, *pixels.shape[:2]]])
        expected = resample.resize_boxes(pixels[None], box, (20, 21), "bicubic")[0, :, ::-1]
        assert np.abs(made.astype(int) - expected.astype(int)).max() <= 1


def test_random_box_agrees_with_numpy():
    import tensorflow as tf

    from dyntoken.data.tf_image import random_box

    options = AugmentOptions(scale=(0.3, 1.0))
    draws = hash_rng.uniform(9, np.arange(60)[:, None], np.arange(22)[None])
    for (height, width), rows in zip([(90, 40), (37, 51), (20, 90)], np.split(draws, 3), strict=True):
        expected = random_boxes(rows, height, width, options.scale, options.ratio)
        made = random_box(tf.constant(rows, tf.float32), tf.constant(height), tf.constant(width), options)
        np.testing.assert_array_equal(made.numpy(), expected)


def test_pad_crop_of_a_streamed_set_is_refused(photos):
    with pytest.raises(data.DataError, match=r"'photos' is streamed: use 'random_resized'"):
        data.train_batches("photos", batch=8, seed=0, size=16, data_dir=photos, augment={"crop": "pad"})


def test_names_splits_and_configs(photos, tmp_path):
    for name in ("", "../photos", "photos/"):
        with pytest.raises(ValueError, match="is not of the form"):
            data.info(name, data_dir=photos)
    for config in ("small", "large"):
        folder = tmp_path / "sized" / config / "1.0.0"
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(data.DataError, match="name one of sized/large, sized/small"):
        data.info("sized", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="unknown data set 'photo'"):
        data.info("photo", data_dir=photos)
    with pytest.raises(data.DataError, match="no split 'val': known: train, validation"):
        data.eval_batches("photos", split="val", batch=8, size=8, data_dir=photos)
