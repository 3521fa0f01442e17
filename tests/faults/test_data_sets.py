"""Sets that lie: order, damage, labels; slices out of range; an open iterator at exit."""

import itertools
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dyntoken import data
from dyntoken.data import tfds_source
from dyntoken.data.in_memory import ArrayRows, ArraySource
from dyntoken.data.info import DataInfo
from dyntoken.data.requests import EvalRequest, TrainRequest
from dyntoken.data.splits import parse_split
from tests.faults.folder import picture

pytest.importorskip("tensorflow")
ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL, STREAMED = (12, 10, 3), (None, None, 3)  # in memory, streamed

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def store(folder, name, shape, labels, **options):
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(shape=shape), "label": tfds.features.ClassLabel(num_classes=4)}
    rows = [
        (i, {"image": np.asarray(picture(max(c, 0), i, (10, 12))), "label": c}) for i, c in enumerate(labels)
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": rows},
        data_dir=folder,
        **options,
    )
    return folder / name / "1.0.0"


BY_CLASS = np.repeat(np.arange(4), 40)


def evaluated(name, folder, split, **request):
    batches = list(
        data.eval_batches(name, split=split, batch=10, size=SMALL[:2], data_dir=str(folder), **request)
    )
    return np.concatenate([b["label"][b["mask"] > 0] for b in batches])


@pytest.mark.thorough
def test_tfds_shuffles_what_it_writes(tmp_path):
    for shape in (SMALL, STREAMED):
        store(tmp_path, f"set{len(str(shape))}", shape, BY_CLASS)
        labels = evaluated(f"set{len(str(shape))}", tmp_path, "train[:25%]")
        assert len(np.unique(labels)) == 4


def test_a_set_in_memory_that_is_stored_in_order_is_stratified(tmp_path):
    store(tmp_path, "ordered", SMALL, BY_CLASS, disable_shuffling=True)
    np.testing.assert_array_equal(np.bincount(evaluated("ordered", tmp_path, "train[:75%]")), [30] * 4)
    np.testing.assert_array_equal(np.bincount(evaluated("ordered", tmp_path, "train[75%:]")), [10] * 4)


def as_written_by_hugging_face(path):
    """TFDS's builder for Hugging Face sets keeps their order and does not say so."""
    info = path / "dataset_info.json"
    content = info.read_text()
    assert '"disableShuffling": true' in content
    info.write_text(content.replace('"disableShuffling": true', '"disableShuffling": false'))


@pytest.mark.thorough
@pytest.mark.parametrize("said", [True, False])
def test_a_streamed_set_that_is_stored_in_order_is_refused(said, tmp_path):
    path = store(tmp_path, "ordered", STREAMED, BY_CLASS, disable_shuffling=True)
    if not said:
        as_written_by_hugging_face(path)
    assert len(evaluated("ordered", tmp_path, "train")) == 160  # the whole of it can be evaluated
    request = {"batch": 16, "size": 8, "data_dir": str(tmp_path)}
    for split in ("train", "train[:50%]"):
        with pytest.raises(data.DataError, match=r"stored in order.*disable_shuffling=False"):
            data.train_batches("ordered", split=split, seed=0, **request)
    with pytest.raises(data.DataError, match="stored in order"):
        data.eval_batches("ordered", split="train[50%:]", **request)


@pytest.mark.thorough
def test_a_set_of_nearly_one_class_is_no_ordered_one(tmp_path):
    store(tmp_path, "skewed", STREAMED, [0] * 159 + [1])
    next(data.train_batches("skewed", batch=16, size=8, seed=0, data_dir=str(tmp_path)))
    with pytest.raises(data.DataError, match=r"data\.balance needs labels"):
        data.train_batches("skewed", batch=16, size=8, seed=0, balance=True, data_dir=str(tmp_path))


def damage_json(name):
    def run(path, record):
        content = (path / name).read_text()
        (path / name).write_text(content[: len(content) // 2])

    return run


DAMAGES = {
    "dataset_info.json": damage_json("dataset_info.json"),
    "features.json": damage_json("features.json"),
    "no features": lambda path, record: (path / "features.json").unlink(),
    "not text": lambda path, record: (path / "dataset_info.json").write_bytes(b"\xff\xfe\0"),
    "cut": lambda path, record: record.write_bytes(record.read_bytes()[:5000]),
    "flipped": lambda path, record: record.write_bytes(record.read_bytes().replace(b"IHDR", b"IHDS", 1)),
    "empty": lambda path, record: record.write_bytes(b""),
    "gone": lambda path, record: record.unlink(),
}


@pytest.fixture(scope="module")
def whole_sets(tmp_path_factory):
    """A folder with two sets, to be copied."""
    folder = tmp_path_factory.mktemp("whole")
    for name, shape in (("set_memory", SMALL), ("set_streamed", STREAMED)):
        store(folder, name, shape, [0, 1, 2, 3] * 40)
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["set_memory", "set_streamed"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_sets_end_in_one_line(damage, name, whole_sets, tmp_path):
    path = shutil.copytree(whole_sets / name, tmp_path / name) / "1.0.0"
    (record,) = path.glob("*tfrecord*")
    DAMAGES[damage](path, record)
    tfds_source._read.cache_clear()
    tfds_source._decoded.cache_clear()
    request = {"batch": 160, "shards": 1, "size": 8, "seed": 0, "data_dir": str(tmp_path)}
    for read in (
        lambda: evaluated(name, tmp_path, "train"),
        lambda: next(data.train_batches(name, **request)),
    ):
        with pytest.raises(data.DataError) as error:
            read()
        text = str(error.value)
        assert "\n" not in text and str(path) in text and "again" in text
        assert "{{" not in text and "[Op:" not in text


@pytest.mark.parametrize("shape", [SMALL, STREAMED], ids=["memory", "streamed"])
def test_labels_outside_the_classes_are_an_error(shape, tmp_path):
    name = f"hidden_{'memory' if shape == SMALL else 'streamed'}"
    store(tmp_path, name, shape, [0, 1, 2, 3] * 9 + [-1])  # as TFDS marks what has no label
    with pytest.raises(data.DataError, match=r"example .*train.* has label -1, but the classes are 0 \.\. 3"):
        list(
            itertools.islice(
                data.train_batches(name, batch=37, shards=1, seed=0, size=8, data_dir=str(tmp_path)), 1
            )
        )
    with pytest.raises(data.DataError, match="has label -1"):
        evaluated(name, tmp_path, "train")


@pytest.mark.parametrize("wrong", [-1, 3, 255])
def test_labels_of_own_arrays(wrong):
    rows = np.array([0, 1, 2, 0, wrong, 1, 2, 0], np.int32)
    source = ArraySource(
        DataInfo("own", 3, (8, 8, 1), {"all": 8}, (0.5,), (0.5,)),
        {"all": ArrayRows(np.ones((8, 8, 8, 1), np.uint8), rows)},
    )
    plan = {"parts": (("all", 2, 8),), "size": (8, 8), "process": (0, 1), "shards": 1}
    train = TrainRequest(**plan, batch=6, seed=0, start_step=0, augment=data.AugmentOptions.of(None))
    with pytest.raises(data.DataError, match=rf"data set 'own': example all\[4\] has label {wrong}, "):
        next(source.train(train))
    with pytest.raises(data.DataError, match=r"example all\[4\]"):
        list(source.evaluate(EvalRequest(**plan, batch=4, crop_pct=1.0, interpolation="bicubic")))
    fine = TrainRequest(
        **{**plan, "parts": (("all", 5, 8),)}, batch=3, seed=0, start_step=0, augment=train.augment
    )
    assert next(source.train(fine))["label"].max() == 2


COUNTS = {"train": 160, "test": 30}


@pytest.mark.parametrize(
    "split",
    ["train[:200%]", "train[-101%:]", "train[:161]", "train[161:]", "train[-161:]", "train[9:3]", "train[:0]"]
    + ["train[50%:50%]", "train[90%:10%]+test", "test+train[:101%]"],
)
def test_slices_out_of_range_are_refused(split):
    with pytest.raises(data.DataError) as error:
        parse_split("own", split, COUNTS)
    assert "train[" in str(error.value) and "160" in str(error.value)


@pytest.mark.parametrize(
    "split, rows",
    [
        ("train[:100%]", ("train", 0, 160)),
        ("train[-100%:]", ("train", 0, 160)),
        ("train[-160:160]", ("train", 0, 160)),
        ("train[-25%:]", ("train", 120, 160)),
        ("train[-5:-1]", ("train", 155, 159)),
        ("test[-10%:]", ("test", 27, 30)),
    ],
)
def test_slices_within(split, rows):
    assert parse_split("own", split, COUNTS) == (rows,)


EXIT = """
import jax  # it asks TensorFlow for more words than it has by itself
from dyntoken import data
request = {{"split": "train", "batch": 8, "size": 8}}
kept = [
    data.train_batches("folder:{root}/trained", seed=0, **request),
    data.train_batches("folder:{root}/prefetched", seed=0, **request),
    data.eval_batches("folder:{root}/evaluated", **request),
]
for batches in kept:
    for _ in range(3):
        next(batches)
kept[1] = data.prefetch(kept[1])
next(kept[1])
print("done")
"""


@pytest.mark.thorough
def test_open_iterators_end_in_silence(tmp_path):
    """And damaged images take one line each."""
    for kind in ("trained", "prefetched", "evaluated"):
        for name in ("a/1.webp", "b/1.jpg"):
            path = tmp_path / kind / name
            path.parent.mkdir(parents=True)
            for number in range(16):
                picture(0, number).save(path.with_stem(str(number)))
        folder = tmp_path / kind
        for path in [folder / "a" / f"{number}.webp" for number in (3, 8, 9)] + [folder / "b" / "5.jpg"]:
            path.write_bytes(path.read_bytes()[:100])
    code = EXIT.format(root=tmp_path)
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (made.returncode, made.stdout) == (0, "done\n"), made.stderr
    said = made.stderr.replace("Improper call to JPEG library in state 201\n", "").splitlines()
    assert all("does not decode" in line for line in said), made.stderr
    for kind in ("trained", "prefetched", "evaluated"):
        assert 0 < sum(f"/{kind}/" in line for line in said) <= 4, made.stderr
