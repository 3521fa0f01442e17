"""Batches are a function of (seed, step), whoever asks for them."""

import itertools

import numpy as np
import pytest

from dyntoken import data
from dyntoken.data import hash_rng, mini

MINI = "fashion_mnist_mini"
PAD = {"crop": "pad", "pad_mode": "reflect"}


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(a, b):
    assert a.keys() == b.keys() == {"image", "label", "mask"}
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_bits_are_pinned():
    # A change here changes every run of every config.
    expected = np.array([0x141DD8C41BECED03, 0xB01B6BCE957E5705, 0xA4E7D8A0DB59065], np.uint64)
    np.testing.assert_array_equal(hash_rng.bits(0, 1, np.arange(3)), expected)
    np.testing.assert_array_equal(hash_rng.permutation(6, 1, 2), [3, 4, 5, 1, 2, 0])
    np.testing.assert_allclose(hash_rng.uniform(7, 3), [0.7111291385792287], rtol=1e-15)


def test_uniform_is_uniform_and_uncorrelated():
    draws = hash_rng.uniform(5, np.arange(20000)[:, None], np.arange(3)[None])
    assert draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(draws.var(0), 1 / 12, atol=0.002)
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03


def test_shapes_and_types():
    batch = next(data.train_batches(MINI, batch=16, seed=0))
    assert batch["image"].shape == (16, 28, 28, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (16,) and batch["label"].dtype == np.int32
    assert batch["mask"].dtype == np.float32 and batch["mask"].sum() == 16


def test_same_seed_same_batches_other_seed_others():
    one, two, other = (take(data.train_batches(MINI, batch=32, seed=s, augment=PAD), 3) for s in (4, 4, 5))
    for a, b in zip(one, two, strict=True):
        assert_same(a, b)
    assert (one[0]["image"] != other[0]["image"]).any()
    assert (one[0]["label"] != other[0]["label"]).any()


@pytest.mark.parametrize("augment", [PAD, {}, None], ids=["pad", "resized", "none"])
def test_resume_equals_uninterrupted_across_epochs(augment):
    request = {"split": "train[:200]", "batch": 48, "seed": 3, "augment": augment}  # 4 steps per epoch
    whole = take(data.train_batches(MINI, **request), 11)
    for start in (1, 4, 7):
        for step, batch in enumerate(take(data.train_batches(MINI, start_step=start, **request), 4), start):
            assert_same(batch, whole[step])


@pytest.mark.parametrize("augment", [PAD, {}], ids=["pad", "resized"])
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_put_together_are_the_global_batch(processes, augment):
    request = {"batch": 48, "seed": 1, "size": 32, "augment": augment, "start_step": 206}  # epoch ends at 208
    whole = take(data.train_batches(MINI, **request), 4)
    parts = [take(data.train_batches(MINI, process=(p, processes), **request), 4) for p in range(processes)]
    for step, batch in enumerate(whole):
        rows = [part[step] for part in parts]
        assert_same({key: np.concatenate([r[key] for r in rows]) for key in batch}, batch)


def test_an_epoch_is_a_permutation_and_epochs_differ():
    first, second = (
        np.concatenate(
            [
                b["image"]
                for b in take(data.train_batches(MINI, split="test", batch=200, seed=0, start_step=s), 10)
            ]
        )
        for s in (0, 10)
    )
    stored = np.concatenate([b["image"] for b in data.eval_batches(MINI, batch=200)])
    for epoch in (first, second):
        assert sorted(i.tobytes() for i in epoch) == sorted(i.tobytes() for i in stored)
    assert (first != second).any() and (first != stored).any()


def test_augmentation_differs_between_epochs():
    request = {"split": "train[:8]", "batch": 8, "seed": 0, "augment": {"crop": "pad", "pad": 6}}
    first, second = take(data.train_batches(MINI, **request), 2)
    one, two = (b["image"][np.argsort(b["label"], kind="stable")] for b in (first, second))
    assert (one != two).any()


@pytest.mark.parametrize("batch", [8, 96, 128, 2048])
@pytest.mark.parametrize("processes", [1, 4])
def test_evaluation_counts_exactly(batch, processes):
    parts = [list(data.eval_batches(MINI, batch=batch, process=(p, processes))) for p in range(processes)]
    assert {len(part) for part in parts} == {-(-2000 // batch)}
    rows = [b for part in parts for b in part]
    assert {len(b["image"]) for b in rows} == {batch // processes}
    mask = np.concatenate([b["mask"] for b in rows])
    labels = np.concatenate([b["label"] for b in rows])
    assert mask.sum() == 2000
    np.testing.assert_array_equal(np.bincount(labels[mask > 0]), [200] * 10)
    padding = np.concatenate([b["image"] for b in rows])[mask == 0]
    assert not padding.any() and not labels[mask == 0].any()


def test_evaluation_keeps_order_and_pixels():
    with np.load(mini.DATA, allow_pickle=False) as stored:
        images = np.concatenate([b["image"] for b in data.eval_batches(MINI, batch=200)])
        np.testing.assert_array_equal(images, stored["test_images"])


def test_evaluation_of_several_splits():
    batches = list(data.eval_batches(MINI, split=("test[:30]", "train[:10]+train[-5:]"), batch=16))
    labels = np.concatenate([b["label"] for b in batches])
    assert sum(b["mask"].sum() for b in batches) == 45 and len(batches) == 3
    with np.load(mini.DATA, allow_pickle=False) as stored:
        train, test = stored["train_labels"], stored["test_labels"]
    np.testing.assert_array_equal(labels[:45], np.concatenate([test[:30], train[:10], train[-5:]]))


def test_per_cent_slices_cut_without_gap():
    counts = data.info(MINI).splits
    assert data.splits.parse_split(MINI, "train[:33%]+train[33%:]", counts) == (
        ("train", 0, 3300),
        ("train", 3300, 10000),
    )


def test_steps_per_epoch():
    assert data.steps_per_epoch(MINI, "train", 128) == 78
    assert data.steps_per_epoch("fake", "test", 64, test=130) == 2
    with pytest.raises(data.DataError, match="larger than the split"):
        data.steps_per_epoch(MINI, "train[:10]", 16)
    with pytest.raises(data.DataError, match=r"the split \(66 images\): use at most 64$"):
        data.steps_per_epoch(MINI, "train[:66]", 128, multiple=8)
    with pytest.raises(data.DataError, match=r"no multiple of 8 fits, lower data.shards"):
        data.steps_per_epoch(MINI, "train[:7]", 8, multiple=8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": 100}, "batch 100 is not divisible by the 8 data shards: use 96 or 104"),
        ({"process": (0, 3)}, "8 data shards do not divide among 3 processes"),
        ({"process": (2, 2)}, r"the index must lie in 0 .. 1"),
        ({"split": "trian"}, "has no split 'trian': did you mean train"),
        ({"split": "train[9:3]"}, "holds no example"),
        ({"split": "train[a:]"}, "not of the form"),
        ({"split": "train[:8]"}, "larger than the split"),
        ({"size": 0}, "size=0 is not a positive number of pixels"),
        ({"size": (28, 28, 1)}, "not a positive number"),
        ({"start_step": -1}, "start_step is -1"),
        ({"augment": {"crop": "padd"}}, "augment.crop is 'padd': did you mean pad"),
        ({"augment": {"interpolation": "bicubik"}}, "did you mean bicubic"),
        ({"augment": {"scale": (0.5, 0.1)}}, "augment.scale"),
        ({"augment": {"flip": 2}}, "augment.flip"),
        ({"augment": {"flipp": 0.5}}, "unknown option 'flipp' of augment: did you mean augment.flip"),
        ({"num_classes": 3}, "unknown option 'num_classes' of data set"),
    ],
)
def test_bad_requests_fail_at_once(change, message):
    with pytest.raises(ValueError, match=message) as error:
        data.train_batches(MINI, **{"batch": 64, "seed": 0, **change})
    assert "\n" not in str(error.value)


def test_bad_evaluation_requests():
    with pytest.raises(data.DataError, match=r"crop_pct is 1\.5"):
        data.eval_batches(MINI, batch=8, crop_pct=1.5)
    with pytest.raises(data.DataError, match="interpolation"):
        data.eval_batches(MINI, batch=8, interpolation="lanczos")


REPEATED = {"batch": 48, "seed": 2, "shards": 4, "augment": {"crop": "pad", "pad": 3, "repeats": 3}}


def test_repeated_augmentation_shows_each_image_three_times():
    options = {"num_classes": 1000, "train": 200, "image_size": 16}  # the label names the image
    batches = take(data.train_batches("fake", **REPEATED, **options), 8)  # 4 steps per epoch
    epochs = [np.stack([b["label"] for b in batches[i : i + 4]]) for i in (0, 4)]
    for epoch in epochs:
        images, counts = np.unique(epoch, return_counts=True)
        assert len(images) == 64 and (counts == 3).all()  # 192 rows
    assert set(epochs[0].ravel()) != set(epochs[1].ravel())
    shards = epochs[0].reshape(4, 4, 12)  # step, shard, row
    for image in np.unique(epochs[0]):
        step, shard, _ = np.nonzero(shards == image)
        assert len(set(shard)) == 3 and len(set(step)) == 1
    pairs = epochs[0].reshape(4, 24, 2)
    assert (pairs[..., 0] != pairs[..., 1]).all()  # mixup never meets the same image
    views = batches[0]["image"][batches[0]["label"] == batches[0]["label"][0]]
    assert len({v.tobytes() for v in views}) == 3


def test_repeated_augmentation_resumes_and_is_the_same_on_any_topology():
    request = {**REPEATED, "split": "train[:200]"}
    whole = take(data.train_batches(MINI, **request), 6)
    for step, batch in enumerate(take(data.train_batches(MINI, start_step=3, **request), 3), 3):
        assert_same(batch, whole[step])
    parts = [take(data.train_batches(MINI, process=(p, 4), **request), 6) for p in range(4)]
    for step, batch in enumerate(whole):
        rows = [part[step] for part in parts]
        assert_same({key: np.concatenate([r[key] for r in rows]) for key in batch}, batch)
    with pytest.raises(data.DataError, match="repeats=3 needs as many data shards, not 2"):
        data.train_batches(MINI, **{**request, "shards": 2})
