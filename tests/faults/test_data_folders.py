"""Own folders: their order, layouts, names and formats, and what does not decode."""

import itertools
import logging
import os
import shutil

import numpy as np
import pytest

from dyntoken import data
from dyntoken.data import folder as folders
from dyntoken.data import hash_rng
from tests.faults.folder import CLASSES, HUES, make_folder, picture

pytest.importorskip("tensorflow")
PIL = pytest.importorskip("PIL.Image")


def put(root, *names, label=0):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(label, number).save(path)
    return f"folder:{root}"


def forget():
    folders._scan.cache_clear()


def labels(name, split, **request):
    batches = data.eval_batches(name, split=split, batch=8, size=8, **request)
    rows = [(b["label"], b["mask"]) for b in batches]
    label, mask = (np.concatenate(column) for column in zip(*rows, strict=True))
    return label[mask > 0]


@pytest.fixture(scope="module")
def sorted_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sorted")
    counts = (40, 40, 20, 10)
    for label, count in enumerate(counts):
        put(root, *(f"c{label}/{i:03}.bmp" for i in range(count)), label=label)
    return f"folder:{root}"


@pytest.mark.thorough
def test_a_slice_holds_its_share_of_every_class(sorted_folder):
    np.testing.assert_array_equal(np.bincount(labels(sorted_folder, "train")), [40, 40, 20, 10])
    np.testing.assert_array_equal(np.bincount(labels(sorted_folder, "train[:75%]")), [30, 30, 15, 7])
    np.testing.assert_array_equal(np.bincount(labels(sorted_folder, "train[75%:]")), [10, 10, 5, 3])
    for cut in ("train[:10%]", "train[40%:50%]", "train[90%:]"):
        assert (np.abs(np.bincount(labels(sorted_folder, cut), minlength=4) - [4, 4, 2, 1]) <= 1).all()


@pytest.mark.thorough
def test_pairs_of_a_batch_meet_all_classes(sorted_folder):
    batches = data.train_batches(sorted_folder, batch=32, size=8, seed=0, shards=8)
    drawn = np.concatenate([b["label"] for b in itertools.islice(batches, 6)]).reshape(-1, 2)
    differ = (drawn[:, 0] != drawn[:, 1]).mean()
    assert differ > 0.5  # of independent draws 0.69
    first = drawn.reshape(6, 8, 4)  # step, shard, row
    assert all(len(np.unique(first[:, shard])) == 4 for shard in range(8))


def test_the_order_depends_on_names_alone(tmp_path):
    names = [f"train/{c}/{i}.bmp" for c in "ab" for i in range(9)]
    orders = []
    for root, some in (("x", names), ("elsewhere/y", names), ("z", [*names, "train/a/new.bmp"])):
        put(tmp_path / root, *some)
        paths = folders._scan(str(tmp_path / root))[1]["train"][0]
        orders.append([os.fsdecode(p).split("/train/")[1] for p in paths])
    assert orders[0] == orders[1] and orders[0] != sorted(orders[0])
    mine, more = ([n for n in order if n.startswith("a")] for order in (orders[0], orders[2]))
    assert mine == [n for n in more if n != "a/new.bmp"]  # a new image moves no other past its neighbours


def test_stratified_order_by_hand():
    rows = np.repeat([0, 1, 2], [4, 8, 2])
    order = hash_rng.stratified(rows, 3, np.arange(14))
    assert sorted(order) == list(range(14))
    np.testing.assert_array_equal(np.bincount(rows[order[:7]]), [2, 4, 1])


@pytest.mark.thorough
def test_the_users_folder(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "dyntoken.data"):
        name = f"folder:{make_folder(tmp_path / 'own')}"
        facts = data.info(name)
    assert facts.class_names == CLASSES and facts.splits == {"train": 65, "val": 16}
    assert "numbered by value (1, 2, 10" in caplog.text and "torchvision" in caplog.text
    for split, count in (("train", 64), ("val", 16)):
        seen = 0
        for batch in data.eval_batches(name, split=split, batch=5, size=16):
            for label, image, mask in zip(batch["label"], batch["image"], batch["mask"], strict=True):
                if mask:
                    seen += 1
                    assert np.abs(image.mean((0, 1)) - HUES[label]).max() < 12  # the label is the picture's
        assert seen == count
    caplog.clear()
    batch = {"batch": 8, "size": 16, "seed": 0, "augment": {}}
    with caplog.at_level(logging.WARNING, "dyntoken.data"):
        steps = list(itertools.islice(data.train_batches(name, **batch), 24))  # three epochs, one row a shard
    assert "train/2/kaputtes Bild ü\\n1.jpg does not decode" in caplog.text
    assert sum(len(step["mask"]) - step["mask"].sum() for step in steps) in (2, 3)
    assert not any("\n" in record.getMessage() for record in caplog.records)


TWO = ("a/1.jpg", "b/1.jpg")


@pytest.mark.parametrize(
    "names, classes, splits",
    [
        (TWO, ("a", "b"), {"train": 2}),
        (("a/x/1.jpg", "a/y/2.webp", "b/1.tif"), ("a", "b"), {"train": 3}),
        (("a/images/1.jpg", "b/images/1.jpg"), ("a", "b"), {"train": 2}),  # one folder deeper
        (("a/x/1.jpg", "a/y/1.jpg", "b/z/1.jpg"), ("a", "b"), {"train": 3}),
        (("train/a/1.jpg", "train/b/i/1.PNG", "val/b/images/1.Jpg"), ("a", "b"), {"train": 2, "val": 1}),
        (("Train/a/1.jpg", "Train/b/1.jpg", "Extra/b/1.bmp"), ("a", "b"), {"Train": 2, "Extra": 1}),
        (("test/a/1.jpg", "val/a/1.jpg"), ("a",), {"test": 1, "val": 1}),
        (
            ("train/1.jpg", "bus/1.jpg", "car/1.jpg"),
            ("bus", "car", "train"),
            {"train": 3},
        ),  # a train is a class
        (("10/1.jpg", "9/1.jpg", "0/1.jpg"), ("0", "9", "10"), {"train": 3}),
        (("10/1.jpg", "9/1.jpg", "x/1.jpg"), ("10", "9", "x"), {"train": 3}),  # not all are numbers
    ],
)
def test_layouts(names, classes, splits, tmp_path):
    facts = data.info(put(tmp_path, *names))
    assert facts.class_names == classes and facts.splits == splits


@pytest.mark.parametrize(
    "names, words",
    [
        (("train/a/1.jpg", "train/b/1.jpg", "val/1.JPEG", "val/2.JPEG"), ("'val'", "val/CLASS/")),
        (("train/1.jpg", "val/1.jpg"), ("'train'", "train/CLASS/")),
        (("train/a/1.jpg", "train/loose.jpg"), ("'train'", "train/CLASS/")),
        (("a/1.jpg", "b/1.jpg", "loose.jpg"), ("loose.jpg", "no class folder")),
        (("flowers/a/1.jpg", "flowers/b/1.jpg"), ("give folder:", "/flowers")),
        (("flowers/train/a/1.jpg", "flowers/val/a/1.jpg"), ("give folder:", "/flowers")),
        (("x/a/1.jpg", "x/b/1.jpg", "y/a/1.jpg", "y/b/1.jpg"), ("'x', 'y'", "DIR/train/")),
        (("train/a/1.jpg", "train/b/1.jpg", "val/c/1.jpg"), ("split 'val'", "class 'c'")),
        (("1/1.jpg", "01/1.jpg"), ("the same number", "rename")),
    ],
)
def test_what_cannot_be_told_apart_is_refused(names, words, tmp_path):
    name = put(tmp_path, *names)
    with pytest.raises(data.DataError) as error:
        data.info(name)
    assert "\n" not in str(error.value)
    for word in (*words, str(tmp_path)):
        assert word in str(error.value)


@pytest.mark.parametrize("left", [(), ("1.heic", "2.heic", "notes.txt")])
@pytest.mark.parametrize("split", ["train/", ""])
def test_an_empty_class_is_refused(split, left, tmp_path):
    name = put(tmp_path, f"{split}a/1.jpg", f"{split}b/1.jpg")
    (tmp_path / split / "dog").mkdir()
    for file in left:
        (tmp_path / split / "dog" / file).write_bytes(b"x")
    with pytest.raises(data.DataError) as error:
        data.info(name)
    for word in ("'dog' holds no image", "2 .heic" if left else "no file", "remove that folder"):
        assert word in str(error.value)


def test_what_is_left_out_is_said(tmp_path, caplog):
    name = put(tmp_path, *TWO)
    (tmp_path / "a" / "2.heic").write_bytes(b"x")
    (tmp_path / "a" / ".hidden.jpg").write_bytes(b"x")
    with caplog.at_level(logging.WARNING, "dyntoken.data"):
        assert data.info(name).splits == {"train": 2}
    assert "left out (1 .heic)" in caplog.text


def test_sets_are_compared_by_name(tmp_path):
    from dyntoken.train import eval_datasets
    from dyntoken.train.settings import DataSettings, EvalSettings

    put(tmp_path / "one", "cat/1.jpg", "dog/1.jpg")
    put(tmp_path / "same", "cat/1.jpg", "dog/1.jpg")
    put(tmp_path / "other", "cat/1.jpg", "wolf/1.jpg")
    put(tmp_path / "numbers", "0/1.jpg", "1/1.jpg")
    chosen = DataSettings(f"folder:{tmp_path / 'one'}", eval_split="train")
    info = data.info(chosen.name)

    def opened(name):
        entry = EvalSettings(f"folder:{tmp_path / name}", split="train")
        return eval_datasets.open_eval_sets(chosen, info, {"more": entry})

    assert set(opened("same")) == {"", "more"}
    with pytest.raises(ValueError, match=r"evals\.more: label 1 is 'wolf' in .* and 'dog' in"):
        opened("other")
    with pytest.raises(ValueError, match=r"evals\.more: label 0 is '0' in"):
        opened("numbers")


def test_a_folder_without_the_split_of_the_recipe(tmp_path):
    from dyntoken.train import eval_datasets
    from dyntoken.train.settings import DataSettings

    name = put(tmp_path, "train/a/1.jpg", "val/a/1.jpg")
    chosen = DataSettings(name, eval_split="validation")
    with pytest.raises(ValueError, match=r"no split 'validation': .*\(--config.data.eval_split=val\)"):
        eval_datasets.open_eval_sets(chosen, data.info(name), {})


ODD_NAMES = [
    "with blanks.jpg",
    "ümläut 猫.jpg",
    "100%s %d.jpg",
    "two\nlines.jpg",
    b"not-utf8-\xff.jpg",
    "[a]*?.jpg",
]


@pytest.mark.thorough
def test_damaged_images_are_named_whatever_their_names(tmp_path, caplog):
    name = put(tmp_path, *(f"{c}/{i}.jpg" for c in "ab" for i in range(4)))
    paths = {}
    for odd in map(os.fsencode, ODD_NAMES):
        spelt = os.fsdecode(odd).replace("\n", "\\n").replace("\udcff", "\\udcff")
        paths[f"/a/{spelt}"] = os.path.join(os.fsencode(tmp_path / "a"), odd)
    for path in paths.values():
        with open(path, "wb") as file:
            file.write(b"\xff\xd8\xff nothing")
    with caplog.at_level(logging.WARNING, "dyntoken.data"):
        batches = list(data.eval_batches(name, split="train", batch=3, size=8))
    assert sum(b["mask"].sum() for b in batches) == 8
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(paths) and not any("\n" in message for message in messages)
    for spelt in paths:
        assert sum(f"{spelt} does not decode" in message for message in messages) == 1
    while paths:
        with pytest.raises(data.DataError) as error:
            list(data.eval_batches(name, split="train", batch=3, size=8, max_corrupt=0))
        (spelt,) = [spelt for spelt in paths if spelt in str(error.value)]
        shutil.copy(tmp_path / "a" / "0.jpg", paths.pop(spelt))  # repaired


@pytest.mark.thorough
def test_unreadable_files_are_named_and_the_run_goes_on(tmp_path, caplog):
    name = put(tmp_path, *(f"{c}/{i}.jpg" for c in "ab" for i in range(8)))
    data.info(name)
    (tmp_path / "a" / "3.jpg").unlink()  # while the run goes on
    (tmp_path / "b" / "5.jpg").unlink()
    (tmp_path / "b" / "5.jpg").mkdir()
    request = {"batch": 4, "size": 8, "seed": 0, "shards": 2, "augment": {}}
    with caplog.at_level(logging.WARNING, "dyntoken.data"):
        steps = list(itertools.islice(data.train_batches(name, **request), 8))
    assert all(b["image"].any((1, 2, 3)).all() for b in steps)
    assert "a/3.jpg does not decode" in caplog.text and "No such file" in caplog.text
    assert "b/5.jpg does not decode" in caplog.text and "Is a directory" in caplog.text


@pytest.mark.thorough
def test_balanced_epochs(tmp_path):
    put(tmp_path, *(f"many/{i}.bmp" for i in range(45)), label=0)
    put(tmp_path, *(f"few/{i}.bmp" for i in range(3)), label=1)
    request = {"size": 8, "batch": 16, "seed": 3, "shards": 4, "balance": True}
    for name, more in ((f"folder:{tmp_path}", {}), ("fashion_mnist_mini", {"split": "train[:50]"})):
        steps = list(itertools.islice(data.train_batches(name, **request, **more), 6))
        for epoch in (steps[:3], steps[3:]):
            counts = np.bincount(np.concatenate([b["label"] for b in epoch]))
            assert counts.max() - counts.min() <= 2 + 2 * bool(more), counts
        resumed = next(data.train_batches(name, start_step=4, **request, **more))
        np.testing.assert_array_equal(resumed["image"], steps[4]["image"])
        parts = [next(data.train_batches(name, process=(p, 2), **request, **more)) for p in range(2)]
        np.testing.assert_array_equal(np.concatenate([p["label"] for p in parts]), steps[0]["label"])


def test_balanced_order_by_hand():
    rows = np.repeat([4, 7, 9], [20, 3, 1])
    order = hash_rng.balanced(rows, 1, 2)
    assert (np.bincount(rows[order])[[4, 7, 9]] == 8).all()
    assert np.bincount(order, minlength=24)[:20].max() == 1  # of the large class none twice
    assert sorted(np.bincount(order, minlength=24)[20:]) == [2, 3, 3, 8]


@pytest.mark.thorough
@pytest.mark.parametrize("batch", [1, 3, 4, 12])
def test_evaluation_batches_of_any_size(batch, tmp_path):
    name = put(tmp_path, *(f"{c}/{i}.bmp" for c in "abc" for i in range(5)))
    for source, split, count in ((name, "train", 15), ("fashion_mnist_mini", "test[:15]", 15)):
        rows = list(data.eval_batches(source, split=split, batch=batch, size=8))
        assert len(rows) == -(-count // batch) and sum(b["mask"].sum() for b in rows) == count
    if batch % 3 == 0:  # three processes, though 8 shards are no multiple of three
        parts = [
            list(data.eval_batches(name, split="train", batch=batch, size=8, process=(p, 3)))
            for p in range(3)
        ]
        assert len({len(part) for part in parts}) == 1
        seen = np.concatenate([b["label"][b["mask"] > 0] for part in parts for b in part])
        np.testing.assert_array_equal(np.bincount(seen), [5, 5, 5])
    else:
        with pytest.raises(data.DataError, match="does not divide among 3 processes"):
            data.eval_batches(name, split="train", batch=batch, size=8, process=(0, 3))


def test_notes_come_once_in_a_run_of_a_program(tmp_path, caplog):
    """Whatever opens the folder again, and only of a folder that can be read."""
    name = put(tmp_path, "10/1.jpg", "9/1.jpg")
    (tmp_path / "9" / "notes.txt").touch()
    (tmp_path / "8").mkdir()
    with caplog.at_level(logging.WARNING, "dyntoken.data"):
        with pytest.raises(data.DataError, match="'8' holds no image"):
            data.info(name)
        assert not caplog.records
        (tmp_path / "8").rmdir()
        for _ in range(3):
            forget()
            data.info(name)
    assert [("numbered by value" in r.getMessage(), "1 .txt" in r.getMessage()) for r in caplog.records] == [
        (True, False),
        (False, True),
    ]


def test_a_single_class_is_said(tmp_path, caplog):
    names = [f"images/{number}.bmp" for number in range(8)]
    with caplog.at_level(logging.WARNING, "dyntoken.data"):
        request = {"batch": 4, "shards": 2, "size": 8, "seed": 0}
        assert next(data.train_batches(put(tmp_path / "one", *names), **request))["mask"].all()
    (record,) = caplog.records
    assert "single class ('images')" in record.getMessage() and "a folder per class" in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dyntoken.data"):
        next(data.train_batches(put(tmp_path / "two", *names, "others/1.bmp"), **request))
    assert not caplog.records


def test_classes_that_are_numbers_are_listed_by_value(tmp_path):
    name = put(tmp_path, *(f"train/{number}/1.jpg" for number in (1, 2, 10, 20)), "val/333/1.jpg")
    with pytest.raises(data.DataError, match=r"known: 1, 2, 10, 20$"):
        data.info(name)
