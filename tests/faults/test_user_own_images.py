"""Own pictures: a run is opened, predicts with its own classes and preprocessing, and says what is odd."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

import dyntoken
from dyntoken import train, workdirs
from dyntoken.analysis import figures, token_strips
from dyntoken.registry import UnknownNameError
from dyntoken.tools import colour, predict, show
from dyntoken.weights import WeightsError
from tests.train.tiny import DTPS, tiny_config

pytestmark = pytest.mark.thorough  # whole programs
CLASSES = ("cherry", "leaf", "sky")
COLOURS = ((200, 30, 40), (40, 180, 50), (40, 60, 210))


def quiet(line):
    """No log."""


def paint(path, rgb, seed, size=(24, 20)):
    noise = np.random.default_rng(seed).integers(-30, 31, (*size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.array(rgb) + noise, 0, 255).astype(np.uint8)).save(path)


def folder_config(where, **more):
    return tiny_config(
        **{
            "model__name": DTPS,
            "model__depth": 2,
            "model__at": (1,),
            "data__name": f"folder:{where}",
            "data__eval_split": "val",
            "data__size": 16,
            "data__options": {},
            "data__augment": None,
            "data__shards": 1,
            "batch": 8,
            "mix": {"mixup": 0.0, "cutmix": 0.0},
            "losses__keep_ratio": {"weight": 1.0},
            "optim": {"lr": 5e-3},
            **more,
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, folder) of a run on three classes of colours."""
    root = tmp_path_factory.mktemp("own")
    for split, count in (("train", 8), ("val", 4)):
        for name, rgb in zip(CLASSES, COLOURS, strict=True):
            for n in range(count):
                paint(root / "data" / split / name / f"{n}.png", rgb, n)
    train.run(folder_config(root / "data", steps=30, log_steps=30), root / "run", log=quiet)
    return root / "run", root / "data"


def test_a_run_opens_without_its_recipe_and_its_data(trained, tmp_path):
    workdir, _ = trained
    run = dyntoken.load_run(workdir)
    assert (run.class_names, run.step) == (CLASSES, 30)
    assert run.preprocess.size == (16, 16) and run.preprocess.channels == 3
    images = np.stack([np.full((30, 40, 3), rgb, np.uint8) for rgb in COLOURS])
    logits = jax.jit(run.model.apply)(run.variables, run.preprocess(images)).logits
    assert [run.name(int(i)) for i in logits.argmax(-1)] == list(CLASSES)
    with pytest.raises(WeightsError, match=str(tmp_path)):
        dyntoken.load_run(tmp_path)
    with pytest.raises(WeightsError, match="no run in"):
        dyntoken.load_run(tmp_path / "absent")
    with pytest.raises(WeightsError, match=r"no checkpoint of step 7; it has: 30"):
        dyntoken.load_run(workdir, step=7)


def test_a_damaged_description_is_named(trained, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained[0], copy)
    path = copy / "checkpoints" / "30" / "meta" / "metadata"
    path.write_text(path.read_text().replace("cherry", "cheery"))
    with pytest.raises(WeightsError, match="description") as error:
        dyntoken.load_run(copy)
    assert "\n" not in str(error.value)


def test_a_path_in_place_of_a_name_points_to_what_opens_it(trained):
    with pytest.raises(UnknownNameError, match=r"dyntoken\.load_run"):
        dyntoken.create_model(str(trained[0]))
    with pytest.raises(UnknownNameError, match=r"dyntoken\.load_run"):
        dyntoken.create_model("gs://bucket/runs/demo")
    with pytest.raises(UnknownNameError, match=r"dyntoken\.load_weights"):
        dyntoken.create_model(__file__)


def test_predictions_are_those_of_the_evaluation(trained, tmp_path, capsys):
    workdir, folder = trained
    out = tmp_path / "deep" / "guesses.csv"
    assert (
        predict.main([f"--workdir={workdir}", str(folder / "val"), f"--out={out}", "--top=2", "--batch=5"])
        == 0
    )
    table = capsys.readouterr().out
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "class", "probability", "class_2", "probability_2"]
    assert len(rows) == 12 and all(row["file"] in table for row in rows)
    right = [row["class"] == row["file"].split("/")[-2] for row in rows]
    assert np.mean(right) == train.evaluate(folder_config(folder, steps=30), workdir, log=quiet)["top1"] > 0.6
    assert all(1 >= float(row["probability"]) >= float(row["probability_2"]) >= 0 for row in rows)


def test_a_damaged_picture_is_named_and_the_rest_goes_on(trained, tmp_path, capsys):
    workdir, _ = trained
    (tmp_path / "bad name.jpg").write_bytes(b"no picture at all")
    paint(tmp_path / "sub" / "good.png", COLOURS[2], 1)
    assert predict.main([f"--workdir={workdir}", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "bad name.jpg" in captured.err and "bad name.jpg" not in captured.out
    assert "good.png" in captured.out and "sky" in captured.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workdir=nowhere", __file__], "no run in nowhere"),
        (["--workdir={run}", "absent.jpg"], "absent.jpg"),
        (["--workdir={run}", "{run}/checkpoints"], "no picture in this folder"),
        (["--workdir={run}", "--step=5", __file__], "no checkpoint of step 5"),
    ],
)
def test_mistakes_are_one_line_and_a_status(trained, capsys, words, said):
    assert predict.main([word.format(run=trained[0]) for word in words]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_grey_pictures_for_a_colour_run_are_said(trained, tmp_path, capsys):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "grey.png")
    paint(tmp_path / "red.png", COLOURS[0], 0)
    assert predict.main([f"--workdir={trained[0]}", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert "grey.png" in error and "red.png" not in error


def test_show_says_the_runs_own_classes_and_a_picture_of_other_colours(
    trained, tmp_path, capsys, monkeypatch
):
    paint(tmp_path / "red.png", COLOURS[0], 0)
    Image.new("L", (20, 20), 90).save(tmp_path / "grey.png")
    titles = []
    monkeypatch.setattr(
        token_strips, "strip", lambda rows, **more: titles.extend(row.caption for row in rows)
    )
    monkeypatch.setattr(figures, "save", lambda figure, path: None)
    shape = [
        "--img_size=16",
        "--set=width=8",
        "--set=depth=2",
        "--set=heads=2",
        "--set=num_classes=3",
        "--at=1",
    ]
    words = [DTPS, f"--weights={trained[0]}", str(tmp_path / "red.png"), str(tmp_path / "grey.png"), *shape]
    assert show.main(words) == 0
    assert len(titles) == 2 and all(any(name in title for name in CLASSES) for title in titles)
    error = capsys.readouterr().err
    assert "grey.png" in error and "red.png" not in error


def test_pictures_of_other_colours_either_way(tmp_path):
    paint(tmp_path / "red.jpg", COLOURS[0], 0)
    Image.new("L", (40, 30), 90).save(tmp_path / "grey.jpg")
    Image.new("P", (40, 30), 3).save(tmp_path / "palette.png")
    (tmp_path / "text.jpg").write_text("no picture")
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    assert "1 of 4" in colour.remark(paths, 1) and "red.jpg" in colour.remark(paths, 1)
    assert "2 of 4" in colour.remark(paths, 3) and "grey.jpg" in colour.remark(paths, 3)
    assert colour.remark(paths[:1], 1) is None


def test_a_renamed_folder_neither_resumes_nor_evaluates(trained, tmp_path):
    """The classes of a folder are its names: as in the checks on made data, here end to end."""
    import shutil

    workdir, folder = trained
    shutil.copytree(folder, tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "cherry").rename(tmp_path / "data" / split / "tomato")
    for go in (train.run, train.evaluate):
        with pytest.raises(ValueError, match=r"'cherry'.*'tomato'"):
            go(folder_config(tmp_path / "data", steps=40), workdir, log=quiet)


def test_a_run_from_before_it_was_described_opens_too(trained, tmp_path):
    """Its data are looked at then."""
    import shutil

    copy = tmp_path / "old"
    shutil.copytree(trained[0], copy)
    path = copy / "checkpoints" / "30" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["run"], meta["checksum"]
    path.write_text(json.dumps({**meta, "checksum": workdirs.checksum(meta)}))
    assert dyntoken.load_run(copy).class_names == CLASSES


def test_show_takes_a_run_for_model_and_weights(trained, tmp_path, capsys):
    workdir, root = trained
    picture = next((root / "val" / "leaf").glob("*.png"))
    assert show.main([str(workdir), str(picture), f"--out={tmp_path / 'kept.png'}"]) == 0
    assert (tmp_path / "kept.png").exists() and "kept" in capsys.readouterr().out
    assert show.main([str(workdir), str(picture), "--weights=w.npz"]) == 1
    assert "leave the options out" in capsys.readouterr().err
