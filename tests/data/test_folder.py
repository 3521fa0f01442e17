"""Folders of images, odd files, corrupt ones, repeated augmentation, and our own TFDS writers."""

import io
import itertools
import json
import logging

import numpy as np
import pytest

from dyntoken import data
from dyntoken.data import tfds_source
from scripts import prepare_data

pytest.importorskip("tensorflow")
PIL = pytest.importorskip("PIL.Image")
cbook = pytest.importorskip("matplotlib.cbook")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
CLASSES = 24  # one training image each, so that the label names the image


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(a, b):
    assert a.keys() == b.keys() == {"image", "label", "mask"}
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope="module")
def photo():
    with PIL.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        return image.convert("RGB").resize((256, 300), PIL.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tree(tmp_path_factory, photo):
    """train/: a piece of the photograph per class, one of them a PNG that is named .jpg; val/: two classes."""
    root = tmp_path_factory.mktemp("tree")
    for split, classes in (("train", range(CLASSES)), ("val", (3, 7))):
        for number in classes:
            folder = root / split / f"c{number:02}"
            folder.mkdir(parents=True)
            left, top = number % 6 * 30, number // 6 * 40
            piece = photo.crop((left, top, left + 60 + number, top + 70))
            piece.save(folder / "a.JPEG", "PNG" if number == 5 else "JPEG")
            if split == "val":
                piece.save(folder / "b.png")
                (folder / "notes.txt").write_text("no image")
    return root


REQUEST = {"batch": 12, "seed": 0, "size": 20, "shards": 3}


def test_info(tree):
    facts = data.info(f"folder:{tree}")
    assert facts.splits == {"train": 24, "val": 4} and facts.num_classes == 24 and facts.channels == 3
    assert facts.class_names[:2] == ("c00", "c01") and facts.mean == (0.485, 0.456, 0.406)
    relative = data.info(f"folder:{tree.name}", data_dir=str(tree.parent))
    assert relative.splits == facts.splits
    flat = data.info(f"folder:{tree / 'train'}")
    assert flat.splits == {"train": 24} and flat.num_classes == 24
    assert len(data.info(f"folder:{tree}", channels=1).mean) == 1


@pytest.mark.thorough
def test_training_and_evaluation(tree):
    name = f"folder:{tree}"
    whole = take(data.train_batches(name, **REQUEST, augment={}), 5)  # 2 steps per epoch
    for epoch in (whole[:2], whole[2:4]):
        labels = np.concatenate([b["label"] for b in epoch])
        assert sorted(labels) == list(range(24)) and (labels != np.arange(24)).any()
    (resumed,) = take(data.train_batches(name, start_step=3, **REQUEST, augment={}), 1)
    assert_same(resumed, whole[3])
    parts = [
        take(data.train_batches(name, start_step=1, process=(p, 3), **REQUEST, augment={}), 1)[0]
        for p in range(3)
    ]
    assert_same({key: np.concatenate([part[key] for part in parts]) for key in whole[1]}, whole[1])
    (batch,) = data.eval_batches(name, split="val", batch=6, shards=1, size=(70, 63))
    assert sorted(batch["label"]) == [0, 0, 3, 3, 7, 7] and sorted(batch["label"][:2]) == [3, 7]
    np.testing.assert_array_equal(batch["mask"], [1, 1, 1, 1, 0, 0])
    with PIL.open(tree / "val" / "c03" / "b.png") as stored:
        pixels = np.asarray(stored)
    assert [
        label for label, row in zip(batch["label"], batch["image"], strict=True) if (row == pixels).all()
    ] == [3]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: None, "no folder"),
        (lambda root: root.mkdir(), "holds no class folder"),
        (
            lambda root: (root / "train" / "c0").mkdir(parents=True),
            "split 'train' of folder .* holds no image",
        ),
        (
            lambda root: [
                (root / split / label).mkdir(parents=True) or (root / split / label / "x.png").touch()
                for split, label in (("train", "cat"), ("val", "cats"))
            ],
            "has a class 'cats' that the others lack: did you mean cat",
        ),
    ],
)
def test_bad_trees(make, message, tmp_path):
    make(tmp_path / "root")
    with pytest.raises(data.DataError, match=message) as error:
        data.info(f"folder:{tmp_path / 'root'}")
    assert "\n" not in str(error.value)
    with pytest.raises(data.DataError, match="give folder:DIR"):
        data.info("folder:")


@pytest.mark.thorough
def test_repeated_augmentation_of_a_stream(tree):
    name, request = f"folder:{tree}", {**REQUEST, "augment": {"repeats": 3}}
    whole = take(data.train_batches(name, **request), 4)
    for epoch in (whole[:2], whole[2:]):
        labels = np.stack([b["label"] for b in epoch]).reshape(2, 3, 4)
        # Four slots of each of three shards: records a b c d | b c d a, of the latter the second view.
        np.testing.assert_array_equal(labels[1], np.roll(labels[0], -1, axis=1))
        assert len(np.unique(labels)) == 12
        images = [b["image"].reshape(3, 4, 20, 20, 3) for b in epoch]
        assert (images[1] != np.roll(images[0], -1, axis=1)).any((2, 3, 4)).all()
        assert (labels[..., 1:] != labels[..., :-1]).all()
    (resumed,) = take(data.train_batches(name, start_step=3, **request), 1)
    assert_same(resumed, whole[3])
    parts = [next(data.train_batches(name, start_step=1, process=(p, 3), **request)) for p in range(3)]
    assert_same({key: np.concatenate([part[key] for part in parts]) for key in whole[1]}, whole[1])


def test_views_take_turns():
    from dyntoken.data.stream import interleaved_views

    rows = [(0, 0), (1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (3, 1), (0, 1), (2, 2), (3, 2), (0, 2), (1, 2)]
    assert interleaved_views(4, 3) == rows
    for records in (2, 3, 4):
        for repeats in (2, 3, 4, 5):
            order = interleaved_views(records, repeats)
            assert sorted(order) == [(r, v) for r in range(records) for v in range(repeats)]
            assert all(a != b for (a, _), (b, _) in itertools.pairwise(order))


DEIT = {"rand_augment": "rand-m9-mstd0.5-inc1"}


@pytest.mark.thorough
def test_randaugment_of_a_stream_and_of_arrays(tree):
    for name in (f"folder:{tree}", "fashion_mnist_mini"):
        plain, drawn = (next(data.train_batches(name, **REQUEST, augment=augment)) for augment in ({}, DEIT))
        np.testing.assert_array_equal(plain["label"], drawn["label"])
        changed = (plain["image"] != drawn["image"]).any((1, 2, 3))
        assert 4 <= changed.sum() < 12  # three quarters, less what leaves an image as it is
        part = next(data.train_batches(name, **REQUEST, process=(1, 3), augment=DEIT))
        np.testing.assert_array_equal(part["image"], drawn["image"][4:8])
    jittered = next(data.train_batches(name, **REQUEST, augment={"color_jitter": 0.4}))
    assert (plain["image"] != jittered["image"]).any((1, 2, 3)).sum() > 8


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, photo):
    """24 pieces; two are cut short and one is no image at all."""
    root = tmp_path_factory.mktemp("damaged")
    for number in range(CLASSES):
        (root / f"c{number:02}").mkdir()
        stream = io.BytesIO()
        photo.crop((number * 5, 0, number * 5 + 80, 90)).save(stream, "JPEG")
        content = stream.getvalue()
        content = {4: content[:300], 13: content[: len(content) // 2], 20: b"nothing"}.get(number, content)
        (root / f"c{number:02}" / "x.jpg").write_bytes(content)
    return f"folder:{root}"


@pytest.mark.thorough
def test_corrupt_images_are_replaced_named_and_counted(damaged, caplog):
    with caplog.at_level(logging.WARNING, "dyntoken.data"):
        whole = take(data.train_batches(damaged, **REQUEST, augment={}), 4)
    assert len(caplog.records) == 3  # once each, though every epoch meets them
    for number in (4, 13, 20):
        assert f"c{number:02}/x.jpg does not decode" in caplog.text
    assert "(3 so far): another image of the batch takes its place" in caplog.text
    for epoch in (whole[:2], whole[2:]):
        labels = np.concatenate([b["label"] for b in epoch])
        assert len(labels) == 24 and set(labels) == set(range(24)) - {4, 13, 20}
    assert all(b["mask"].sum() == 12 and b["image"].any((1, 2, 3)).all() for b in whole)
    (resumed,) = take(data.train_batches(damaged, start_step=3, **REQUEST, augment={}), 1)
    assert_same(resumed, whole[3])
    parts = [next(data.train_batches(damaged, process=(p, 3), **REQUEST, augment={})) for p in range(3)]
    assert_same({key: np.concatenate([part[key] for part in parts]) for key in whole[0]}, whole[0])


@pytest.mark.thorough
def test_corrupt_images_are_not_evaluated_and_limited(damaged, caplog):
    request = {"split": "train", "batch": 12, "shards": 1, "size": 16}
    with caplog.at_level(logging.WARNING, "dyntoken.data"):
        batches = list(data.eval_batches(damaged, **request))
    mask = np.concatenate([b["mask"] for b in batches])
    labels = np.concatenate([b["label"] for b in batches])
    assert (mask == 0).sum() == 3 and set(labels[mask > 0]) == set(range(24)) - {4, 13, 20}
    assert not np.concatenate([b["image"] for b in batches])[mask == 0].any()
    with pytest.raises(
        data.DataError, match=r"x\.jpg of data set .* does not decode, the 3th: more than max_co"
    ):
        list(data.eval_batches(damaged, **request, max_corrupt=2))


def test_replacement_by_hand():
    from dyntoken.data.files import FileRecords
    from dyntoken.data.stream import CorruptLog, replace_bad

    def batch(bad):
        rows = np.arange(6)
        more = {"mask": np.ones(6, np.float32), "bad": np.array(bad, bool), "name": np.array([b"n"] * 6)}
        return {"image": rows * 10, "label": rows, **more}

    log = CorruptLog(data.info("fake"), 9, FileRecords({}))
    assert replace_bad(batch([0, 1, 0, 1, 1, 0]), 3, log)["label"].tolist() == [0, 0, 2, 5, 5, 5]
    assert replace_bad(batch([1, 1, 0, 0, 0, 1]), 3, log)["image"].tolist() == [20, 20, 20, 30, 40, 40]
    made = replace_bad(batch([1, 1, 1, 0, 0, 0]), 3, log)  # no good row in the first shard
    assert made["mask"].tolist() == [0, 0, 0, 1, 1, 1] and made["label"].tolist()[2:] == [3, 3, 4, 5]
    made = replace_bad(batch([1, 0, 0, 0, 1, 1]), 1, log)  # one row for each shard: that of its pair
    assert made["mask"].tolist() == [0, 1, 1, 1, 0, 0] and made["label"].tolist() == [1, 1, 2, 3, 0, 0]


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_odd_files_decode_as_pillow_has_them(photo):
    """Grey and CMYK JPEGs, and PNGs of several kinds, whole and cropped."""
    import tensorflow as tf

    from dyntoken.data.tf_image import _decode

    piece = photo.crop((60, 40, 140, 130))
    files = {
        "grey": encoded(piece.convert("L"), "JPEG", quality=95),
        "cmyk": encoded(piece.convert("CMYK"), "JPEG", quality=95),
        "png": encoded(piece, "PNG"),
        "palette": encoded(piece.quantize(64), "PNG"),
        "alpha": encoded(piece.convert("RGBA"), "PNG"),
        "progressive": encoded(piece, "JPEG", progressive=True),
    }
    box = tf.constant([10, 20, 48, 40])
    for kind, content in files.items():
        with PIL.open(io.BytesIO(content)) as stored:
            expected = np.asarray(stored.convert("RGB")).astype(int)
        made = _decode(content, 3).numpy().astype(int)
        assert made.shape == (90, 80, 3)
        assert np.abs(made - expected).mean() < 1.5, kind
        cropped = _decode(content, 3, lambda height, width: box).numpy()
        np.testing.assert_array_equal(cropped, made[10:58, 20:60], kind)


@pytest.mark.parametrize("box", [(0, 0, 90, 80), (3, 1, 20, 31), (11, 16, 16, 64), (40, 79, 5, 1)])
@pytest.mark.parametrize("subsampling", (0, 1, 2))
def test_a_crop_of_a_jpeg_is_cut_from_the_whole(photo, subsampling, box):
    """TensorFlow's decode_and_crop_jpeg alone takes other colours for the outermost columns."""
    import tensorflow as tf

    from dyntoken.data.tf_image import _decode

    content = encoded(photo.crop((60, 40, 140, 130)), "JPEG", quality=90, subsampling=subsampling)
    top, left, height, width = box
    cropped = _decode(content, 3, lambda *shape: tf.constant(box)).numpy()
    whole = _decode(content, 3).numpy()
    np.testing.assert_array_equal(cropped, whole[top : top + height, left : left + width])


def store(tmp_path, name, features, rows):
    import tensorflow_datasets as tfds

    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"validation": rows},
        data_dir=tmp_path,
    )
    return str(tmp_path)


@pytest.mark.thorough
def test_imagenet_real_gives_every_label(tmp_path, photo):
    import tensorflow_datasets as tfds

    pixels, label = np.asarray(photo), tfds.features.ClassLabel(num_classes=6)
    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        "original_label": label,
        "real_label": tfds.features.Sequence(label),
        "file_name": tfds.features.Text(),
    }
    known = [[1], [0, 4], [], [5]]
    rows = [
        (i, {"image": pixels, "original_label": i, "real_label": k, "file_name": str(i)})
        for i, k in enumerate(known)
    ]
    folder = store(tmp_path, "imagenet2012_real", features, rows)
    assert data.info("imagenet2012_real", data_dir=folder).num_classes == 6
    request = {"split": "validation", "batch": 8, "size": 32, "data_dir": folder}
    (batch,) = data.eval_batches("imagenet2012_real", **request)
    assert batch["labels"].shape == (8, 6) and batch["labels"].dtype == bool and batch["mask"].sum() == 3
    for original, labels, mask in zip(batch["label"], batch["labels"], batch["mask"], strict=True):
        if mask:
            assert np.flatnonzero(labels).tolist() == known[original]


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "imagenet2012_real",
            ["put ILSVRC2012_img_val.tar (from", "`tfds build imagenet2012_real --data_dir="],
        ),
        ("imagenet_v2", ["`tfds build imagenet_v2/matched-frequency --data_dir="]),
        ("imagenet_v2/topimages:3.0.0", ["`tfds build imagenet_v2/topimages:3.0.0 --data_dir="]),
        (
            "i_naturalist2019",
            ["`python scripts/prepare_data.py inat2019 --source=DIR --data_dir=", "train2019.json"],
        ),
    ],
)
def test_absent_sets_name_the_command(name, words, tmp_path):
    split = {"imagenet_v2": "test", "imagenet2012_real": "validation"}.get(name.split("/")[0], "train")
    with pytest.raises(data.MissingDataError) as error:
        data.train_batches(name, split=split, batch=8, size=32, seed=0, data_dir=str(tmp_path))
    assert "\n" not in str(error.value)
    for word in [*words, str(tmp_path)]:
        assert word in str(error.value)


@pytest.fixture
def inat(tmp_path, photo):
    """A tree as the official archive unpacks: 3 categories, 5 training and 2 validation images."""
    source = tmp_path / "source"
    categories = [{"id": i, "name": f"species {i}", "kingdom": "Plants"} for i in (2, 0, 1)]
    for split, numbers in (("train", range(5)), ("val", range(5, 7))):
        images, annotations = [], []
        for number in numbers:
            file_name = f"train_val2019/Plants/{number % 3}/{number:032x}.jpg"
            (source / file_name).parent.mkdir(parents=True, exist_ok=True)
            photo.crop((number, 0, 40 + number, 50)).save(source / file_name)
            images.append({"id": 100 + number, "file_name": file_name, "width": 40, "height": 50})
            annotations.append({"id": number, "image_id": 100 + number, "category_id": number % 3})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (source / f"{split}2019.json").write_text(json.dumps(content))
    return source, tmp_path / "tfds"


@pytest.mark.thorough
def test_inaturalist_is_written_as_it_is(inat, capsys):
    source, out = inat
    flags = ["inat2019", f"--source={source}", f"--data_dir={out}"]
    assert prepare_data.main(flags) == 0
    assert prepare_data.main(flags) == 1 and "exists already" in capsys.readouterr().err
    facts = data.info("i_naturalist2019", data_dir=str(out))
    assert facts.splits == {"train": 5, "validation": 2} and facts.num_classes == 3
    assert facts.class_names == ("species 0", "species 1", "species 2")
    request = {"split": "train", "batch": 8, "size": (50, 40), "data_dir": str(out)}
    (batch,) = data.eval_batches("i_naturalist2019", **request)
    assert sorted(batch["label"][batch["mask"] > 0]) == [0, 0, 1, 1, 2]
    builder, _ = tfds_source._read("i_naturalist2019", f"{out}/i_naturalist2019/1.0.0")
    rows = list(tfds_source.TfdsRecords(builder).read((("train", 0, 5),), None).as_numpy_iterator())
    stored = {(source / f"train_val2019/Plants/{n % 3}/{n:032x}.jpg").read_bytes(): n % 3 for n in range(5)}
    assert {image: label for image, label, _ in rows} == stored  # the very bytes, with their labels


def test_inaturalist_errors(inat, capsys):
    source, out = inat
    flags = ["inat2019", f"--source={source}", f"--data_dir={out}"]
    (source / "val2019.json").write_text("{}")
    assert prepare_data.main(flags) == 1 and "is no iNaturalist annotation file" in capsys.readouterr().err
    (source / "val2019.json").unlink()
    assert prepare_data.main(flags) == 1 and "no file" in capsys.readouterr().err
