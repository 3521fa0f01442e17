"""The embedded and the generated data set, and what is said of absent ones."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dyntoken import data
from dyntoken.data import mini
from dyntoken.registry import UnknownNameError
from scripts import prepare_data

IDX_DIR = Path("/usr/share/datasets/fashion-mnist")


def test_embedded_set_is_small_balanced_and_licensed():
    assert mini.DATA.stat().st_size < 6_000_000
    assert "Zalando" in (mini.FOLDER / "LICENSE").read_text()
    assert "prepare_data" in (mini.FOLDER / "README.md").read_text()
    facts = data.info("fashion_mnist_mini")
    assert facts.splits == {"train": 10000, "test": 2000}
    assert facts.image_shape == (28, 28, 1) and facts.num_classes == 10 and facts.channels == 1
    assert facts.class_names[9] == "Ankle boot"
    with np.load(mini.DATA, allow_pickle=False) as stored:
        np.testing.assert_array_equal(np.bincount(stored["train_labels"]), [1000] * 10)
        np.testing.assert_array_equal(np.bincount(stored["test_labels"]), [200] * 10)
        pixels = stored["train_images"] / 255.0
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [facts.mean[0], facts.std[0]], atol=0.002)


@pytest.mark.skipif(
    not (IDX_DIR / "train-images-idx3-ubyte.gz").exists(), reason="no Fashion-MNIST idx files here"
)
def test_embedded_set_equals_the_idx_files():
    made = prepare_data.mini_arrays(IDX_DIR)
    with np.load(mini.DATA, allow_pickle=False) as stored:
        assert set(stored) == set(made)
        for key, array in made.items():
            np.testing.assert_array_equal(stored[key], array)


def test_mini_choice_is_the_first_of_each_class():
    labels = np.array([*range(10), 3, *range(10), 0])
    np.testing.assert_array_equal(prepare_data.choose(labels, 2), [*range(11), 11, 12, 13, *range(15, 21)])
    with pytest.raises(data.DataError, match="fewer than 3"):
        prepare_data.choose(labels, 3)


def test_idx_errors(tmp_path, capsys):
    assert prepare_data.main(["mini", f"--source={tmp_path}"]) == 1
    assert "no file" in capsys.readouterr().err
    bad = tmp_path / "train-images-idx3-ubyte.gz"
    bad.write_bytes(b"nothing")
    with pytest.raises(data.DataError, match="not a whole gzip file"):
        prepare_data.read_idx(bad)


def test_fake_is_deterministic_and_follows_its_options():
    options = {"num_classes": 7, "train": 64, "test": 20, "image_size": (24, 40), "channels": 1}
    facts = data.info("fake", **options)
    assert facts.splits == {"train": 64, "test": 20} and facts.num_classes == 7
    assert facts.image_shape == (24, 40, 1) and len(facts.mean) == 1
    one, two = (list(data.eval_batches("fake", batch=16, **options)) for _ in range(2))
    assert [b["mask"].sum() for b in one] == [16, 4]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(one[0]["label"], np.arange(16) % 7)
    train = next(data.eval_batches("fake", split="train", batch=16, **options))
    assert (train["image"] != one[0]["image"]).any()


@pytest.mark.parametrize("classes", [4, 10, 1000])
def test_fake_classes_are_visible(classes):
    # Nearest class mean over the board's cells tells the classes apart.
    request = {"num_classes": classes, "train": 4 * classes, "test": 2 * classes, "image_size": 8}
    sums = {}
    for split in ("train", "test"):
        rows = data.sources.open_source("fake", **request)._rows(split)
        images, labels = rows.take(np.arange(request[split]))
        saturated = images.max(-1) > 100
        if classes <= 8:  # the hue alone
            colour = (images * saturated[..., None]).sum((1, 2)) / saturated.sum((1, 2))[:, None]
            sums[split] = colour, labels
        else:
            sums[split] = (images * saturated[..., None]).reshape(len(images), -1).astype(float), labels
    features, labels = sums["train"]
    means = np.stack([features[labels == c].mean(0) for c in range(classes)])
    features, labels = sums["test"]
    distance = (means**2).sum(1)[None] - 2 * features @ means.T  # up to a constant per row
    assert (distance.argmin(1) == labels).mean() == 1.0


def test_fake_options_are_checked():
    with pytest.raises(data.DataError, match=r"num_classes is 0"):
        data.info("fake", num_classes=0)
    with pytest.raises(UnknownNameError, match=r"unknown option 'num_class'.*did you mean num_classes"):
        data.info("fake", num_class=3)


def test_table():
    assert {"fashion_mnist_mini", "fashion_mnist", "cifar10", "imagenet2012", "fake"} <= set(data.SOURCES)


def test_unknown_name_gives_the_nearest(tmp_path):
    with pytest.raises(UnknownNameError, match="fashion_mnist_mini") as error:
        data.info("fashion_mnist_min", data_dir=str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "imagenet2012",
            ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "tfds build imagenet2012 --data_dir="],
        ),
        ("imagenet2012:5.1.0", ["downloads/manual"]),
        (
            "fashion_mnist",
            [
                "`tfds build fashion_mnist --data_dir=",
                "python scripts/prepare_data.py fashion_mnist ",
            ],
        ),
        ("cifar10", ["tfds build cifar10 --data_dir="]),
        ("oxford_iiit_pet", ["tfds build oxford_iiit_pet --data_dir="]),
    ],
)
def test_absent_data_names_the_folder_and_the_command(name, words, tmp_path):
    with pytest.raises(data.MissingDataError) as error:
        split = "train" if name in data.SOURCES or ":" in name else "test"
        data.train_batches(name, split=split, batch=8, size=32, seed=0, data_dir=str(tmp_path))
    message = str(error.value)
    assert "\n" not in message
    for word in [*words, str(tmp_path)]:
        assert word in message
    assert list(tmp_path.iterdir()) == []  # nobody tried to fetch it


def test_common_sets_are_described_without_data(tmp_path):
    facts = data.info("imagenet2012", data_dir=str(tmp_path))
    assert facts.num_classes == 1000 and facts.splits["validation"] == 50000 and facts.image_shape is None
    assert facts.mean == (0.485, 0.456, 0.406) and facts.std == (0.229, 0.224, 0.225)
    assert data.steps_per_epoch("imagenet2012", "train", 1024, data_dir=str(tmp_path)) == 1251
    with pytest.raises(data.DataError, match="differ in size"):
        data.train_batches("imagenet2012", batch=8, seed=0, data_dir=str(tmp_path))


def test_embedded_set_needs_numpy_only():
    script = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "PIL", "matplotlib", "jax", "flax"):
    sys.modules[name] = None
from dyntoken import data
heavy = {"etils", "absl", "scipy"} & set(sys.modules)
assert not heavy, heavy
for name in ("fashion_mnist_mini", "fake"):
    batch = next(data.train_batches(name, batch=8, size=32, seed=0, augment={}))
    assert batch["image"].shape[:3] == (8, 32, 32)
    assert sum(b["mask"].sum() for b in data.eval_batches(name, split="test[:20]", batch=8)) == 20
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_missing_tensorflow_is_said(tmp_path):
    folder = tmp_path / "fashion_mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    script = f"""
import importlib.machinery
real = importlib.machinery.PathFinder.find_spec
def find_spec(name, *args):
    return None if name.partition(".")[0] == "tensorflow" else real(name, *args)
importlib.machinery.PathFinder.find_spec = find_spec
from dyntoken import data
try:
    data.train_batches("fashion_mnist", batch=8, seed=0, data_dir={str(tmp_path)!r})
except data.DataError as error:
    assert str(error) == "TensorFlow is not installed: pip install tensorflow", error
else:
    raise AssertionError
try:
    data.train_batches("oxford_iiit_pet", batch=8, seed=0, data_dir={str(tmp_path)!r})
except data.MissingDataError as error:
    assert "tfds build" in str(error) and "pip install tensorflow" in str(error), error
else:
    raise AssertionError
try:
    data.train_batches("fake", batch=8, seed=0, augment={{"rand_augment": "rand-m9-mstd0.5-inc1"}})
except data.MissingDataError as error:
    assert str(error) == "TensorFlow is not installed: pip install tensorflow", error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True)
