"""`tools.show_augmentation`: what training sees of which images."""

from __future__ import annotations

import numpy as np
import pytest

from dyntoken import config as recipes
from dyntoken import data
from dyntoken.tools import show_augmentation
from dyntoken.train.settings import read

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
MINI = "fashion_mnist_mini"


def settings(mix, **augment):
    c = recipes.load("configs/deit.py:demo")
    c.data.augment = augment
    c.mix = mix
    return read(c)


def look(mix, images=4, draws=3, **augment):
    chosen = settings(mix, **augment)
    return show_augmentation.look(
        chosen.data, chosen.mix, data.info(MINI), seed=0, images=images, draws=draws
    )


def test_the_lines_show_one_image_before_and_after_mixing():
    off = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}
    seen = look(off, crop="none", flip=0.0, repeats=3)
    np.testing.assert_array_equal(seen.rows, [1250, 3750, 6250, 8750])  # of 10,000
    batch = next(data.eval_batches(MINI, split="train[3750:3751]", batch=1, shards=1))
    assert seen.labels[1] == batch["label"][0]
    np.testing.assert_array_equal(seen.stored[1], batch["image"][0])
    for draw in range(3):
        np.testing.assert_array_equal(seen.drawn[:, draw], seen.stored)
        np.testing.assert_array_equal(seen.fed[:, draw], seen.stored)  # normalisation undone
    np.testing.assert_array_equal(seen.targets.argmax(-1), np.tile(seen.labels[:, None], (1, 3)))


def test_every_draw_of_every_image_is_its_own():
    off = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}
    seen = look(off, images=2, draws=8, crop="random_resized", flip=0.0)
    assert len(np.unique(seen.drawn.reshape(16, -1), axis=0)) == 16


def test_images_are_changed_independently():
    """Not all images of a column are mirrored at once."""
    off = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}
    seen = look(off, draws=16, crop="none", flip=0.5)
    mirrored = (seen.drawn == seen.stored[:, None, :, ::-1]).all((2, 3, 4))
    assert 0.2 < mirrored.mean() < 0.8 and len(np.unique(mirrored, axis=0)) == 4


def test_columns_are_mixed_like_batches():
    seen = look({"mixup": 1.0, "cutmix": 0.0, "smoothing": 0.0}, crop="none", flip=0.0)
    own = np.take_along_axis(seen.targets[0], seen.labels[0].reshape(1, 1), axis=1)[:, 0]
    assert len(np.unique(own)) == 3 and seen.labels[0] != seen.labels[1]
    for draw, share in enumerate(own):  # row 0 with row 1, and the other way round
        first, second = (seen.stored[n].astype(float) for n in (0, 1))
        np.testing.assert_allclose(seen.fed[0, draw], share * first + (1 - share) * second, atol=0.51)
        np.testing.assert_allclose(seen.fed[1, draw], share * second + (1 - share) * first, atol=0.51)
        assert seen.targets[1, draw, seen.labels[0]] == pytest.approx(1 - share, abs=1e-6)


def test_shares_of_a_target():
    assert show_augmentation.shares(np.array([0.02, 0.38, 0.58, 0.02]), 1) == "38 % + 58 %"
    assert show_augmentation.shares(np.array([0.925, 0.025, 0.025, 0.025]), 0) == "92 %"
    assert show_augmentation.shares(np.array([1.0, 0.0]), 0) == "100 %"


def test_the_note_tells_what_the_recipe_does():
    text = show_augmentation.note(read(recipes.load("configs/tps_deit.py")))
    assert "crop (random_resized), flip, RandAugment." in text and "3 such views" in text
    assert "erased and mixed with the neighbouring image" in text
    text = show_augmentation.note(read(recipes.load("configs/lvvit.py")))
    assert "as the model gets them, erased;" in text and "MixToken mixes inside the model" in text
    text = show_augmentation.note(read(recipes.load("configs/tps_deit.py:demo")))
    assert "crop (pad), flip." in text and "erased" not in text and "views" not in text


def test_a_sheet_is_written(tmp_path, capsys):
    out = tmp_path / "deep" / "seen.png"
    argv = ["configs/dvt_deit.py:demo", f"--out={out}", "--images=2", "--draws=2"]
    assert show_augmentation.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        str(out),
        "data.augment: crop=pad, flip=0.5, pad=1",
    ]
    with Image.open(out) as image:
        assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 20


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["configs/tps_deit.py", "--data_dir=/nowhere"],
            ["tfds build imagenet2012", "add --data="],
        ),
        (["configs/nothing.py"], ["no recipe configs/nothing.py"]),
        (["configs/deit.py:demo", "--images=20000"], ["has 10000 images"]),
    ],
)
def test_errors_say_what_to_do(argv, words, capsys, tmp_path):
    assert show_augmentation.main([*argv, f"--out={tmp_path / 'x.png'}"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words)


def test_an_odd_number_of_images_is_refused(capsys):
    with pytest.raises(SystemExit):
        show_augmentation.main(["configs/deit.py:demo", "--images=3"])
    assert "3 is odd" in capsys.readouterr().err
