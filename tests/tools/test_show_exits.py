"""`tools.show_exits`: which images end up in which row."""

from __future__ import annotations

import argparse
import json
import shutil

import numpy as np
import pytest

import dyntoken
from dyntoken import data
from dyntoken.analysis import timing
from dyntoken.eval import exits
from dyntoken.tools import show_exits
from dyntoken.weights import save_weights
from tests.tools import exit_run

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


@pytest.fixture
def seen():
    """Six images of value 10 x number, two classes, two exits."""
    labels = np.array([0, 0, 0, 1, 1, 1])
    margins = np.array(
        [[4.0, 1.0, -2.0, 3.0, -1.0, -3.0], [1.0, 1.0, 1.0, 1.0, 1.0, -1.0]]
    )  # for the true class
    logits = np.zeros((2, 6, 2), np.float32)
    np.put_along_axis(
        logits, np.broadcast_to(labels, (2, 6))[..., None], margins[..., None].astype(np.float32), -1
    )

    def batches():
        for start in (0, 4):
            ids = np.arange(start, start + 4)
            image = np.broadcast_to(10 * (ids % 6)[:, None, None, None], (4, 8, 8, 1)).astype(np.uint8)
            yield {"image": image, "mask": (ids < 6).astype(np.float32)}

    return show_exits.Split("a model", labels, logits, ("cat", "dog"), batches)


def rows(figure):
    """(value of each image / 10, caption) in the order drawn; labels on the left."""
    values = [round(float(axis.images[0].get_array()[0, 0, 0]) * 25.5) for axis in figure.axes]
    texts = [text.get_text() for text in figure.texts]
    return values, [t for t in texts if ("exit" in t and "\n" in t) or t.startswith("never")], texts


def test_only_the_wanted_images_are_kept_padding_left_out(seen):
    found = seen.images([5, 2])
    assert sorted(found) == [2, 5]
    assert (found[5] == 50).all() and (found[2] == 20).all()


def test_images_by_the_exit_they_take(seen):
    scores, correct = exits.score("confidence", seen.logits), exits.correct_of(seen.logits, seen.labels)
    taken = exits.exit_of(scores, [0.8, -1e8])  # scores: 0.98 0.73 0.88 0.95 0.73 0.95
    np.testing.assert_array_equal(taken, [0, 1, 0, 0, 1, 0])
    figure = show_exits.taken_sheet(seen, taken, scores, correct, "how", 2)
    values, labels, texts = rows(figure)
    # Exit 0: cats 0, 2 and dogs 3, 5, the surest above; exit 1: cat 1 and dog 4.
    assert values == [0, 3, 2, 5, 1, 4]
    assert labels == [
        "leave at exit 0\n66.7 % of images\n50.0 % right",
        "leave at exit 1\n33.3 % of images\n100.0 % right",
    ]
    assert texts[0] == "a model: images by exit (how)" and texts[1:3] == ["cat", "dog"]
    assert [t for t in texts if t in ("cat", "dog")] == [
        "cat",
        "dog",
        "dog",
        "cat",
    ]  # two wrong ones say the other
    assert texts.count("0.982") == 1 and texts.count("0.731") == 2


def test_images_by_the_first_exit_that_is_right(seen):
    scores, correct = exits.score("confidence", seen.logits), exits.correct_of(seen.logits, seen.labels)
    figure = show_exits.first_right_sheet(seen, scores, correct, 3)
    values, labels, _ = rows(figure)
    assert values == [0, 3, 1, 2, 4, 5]
    assert labels == [
        "first right at exit 0\n50.0 % of images",
        "first right at exit 1\n33.3 % of images",
        "never right\n16.7 % of images",
    ]


def test_many_classes_are_just_examples(seen):
    names = tuple(f"c{index}" for index in range(40))
    many = show_exits.Split(seen.title, seen.labels, seen.logits, names, seen.batches)
    scores, correct = exits.score("confidence", seen.logits), exits.correct_of(seen.logits, seen.labels)
    figure = show_exits.first_right_sheet(many, scores, correct, 2)
    values, _, texts = rows(figure)
    assert values == [0, 3, 1, 2, 4, 5]  # the surest first, whatever their class
    assert texts.count("c0") + texts.count("c1") == 6 and "c2" not in texts


def test_sheets_of_a_run_and_its_calibration(exit_workdir, tmp_path, capsys):
    workdir = shutil.copytree(exit_workdir, tmp_path / "run")
    held = {"rule": "entropy", "seed": 0, "unit": "gmacs", "budgets": [2.0, 1.0]}
    limits = [[exits.NEVER, exits.NEVER, exits.ALWAYS], [exits.ALWAYS] * 3]
    (workdir / "budget").mkdir()
    (workdir / "budget" / "calibration.json").write_text(json.dumps({**held, "thresholds": limits}))
    assert show_exits.main([f"--workdir={workdir}", "--budget=1.9", "--examples=1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.rsplit("/", 1)[-1] for line in out[:3]] == [
        "exits_taken.png",
        "first_right.png",
        "shares.png",
    ]
    assert out[3] == "exit 0: 0.0 % of 61 images" and out[5].startswith("exit 2: 100.0 % of 61 images, ")
    for name in ("exits_taken", "first_right", "shares"):
        with Image.open(workdir / "shown" / f"{name}.png") as picture:
            assert picture.format == "PNG" and min(picture.size) > 300


def test_the_budget_nearest_to_the_one_asked_for():
    found = {"unit": "ms", "budgets": [3.0, 1.0, 2.0], "thresholds": [[3.0], [1.0], [2.0]]}
    for asked, limit, how in ((None, 2, "budget 2 ms"), (0.2, 1, "budget 1 ms"), (2.6, 3, "budget 3 ms")):
        args = argparse.Namespace(budget=asked, thresholds=None)
        assert show_exits.choose(args, found, 1) == (limit, how)


def test_sheets_of_weights_and_a_data_set(tmp_path, capsys):
    small = {**exit_run.SMALL, "exits": (1, 2), "in_chans": 1, "img_size": 28}
    options = [f"--set={key}={value}" for key, value in small.items() if key != "img_size"]
    model = dyntoken.create_model("dvt_vit_mini", **small)
    path = tmp_path / "w.safetensors"
    save_weights(path, timing.random_variables(model), model=model)
    argv = ["dvt_vit_mini", "fashion_mnist_mini:test[:12]", f"--weights={path}", "--img_size=28"]
    assert show_exits.main([*argv, *options, "--thresholds=0", f"--out={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "exit 0: 100.0 % of 12 images" in out and "exit 1: 0.0 % of 12 images" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["exits_taken.png", "first_right.png"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no thresholds: give --thresholds=0.9,0.8"),
        (["--workdir=WORKDIR"], "run python -m dyntoken.tools.thresholds --workdir="),
        (["--workdir=WORKDIR", "--rule=margin"], "--rule belongs to --thresholds"),
        (["--workdir=WORKDIR", "--thresholds=0.9", "--budget=1"], "give one of them"),
        (["--workdir=WORKDIR", "--thresholds=0.9", "a", "b"], "--workdir knows its model"),
        (["--workdir=nowhere", "--thresholds=0.9"], "no run in"),
        (["dvt_vit_mini", "--thresholds=0.9"], "give --workdir=DIR, or NAME --weights=FILE DATA"),
        (
            ["dvt_deit_tiny", "--weights=w", "--thresholds=0.9", "fashion_mnist_mini"],
            "1 channels, the model takes 3",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_1(exit_workdir, argv, message, capsys):
    assert show_exits.main([word.replace("WORKDIR", str(exit_workdir)) for word in argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith("python -m dyntoken.tools.show_exits: error: ")
    assert message in error and error.count("\n") == 1


def test_pixels_reach_the_sheet_as_they_are_in_the_split():
    def batches():
        return data.eval_batches("fashion_mnist_mini", split="test[:61]", batch=16)

    whole = next(iter(data.eval_batches("fashion_mnist_mini", batch=61, shards=1)))
    found = show_exits.Split("", None, None, (), batches).images([0, 17, 60])
    for number, pixels in found.items():
        np.testing.assert_array_equal(pixels, whole["image"][number])
