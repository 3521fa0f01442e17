"""`tools.show` writes pictures of the right images."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import dyntoken
from dyntoken import data, train
from dyntoken.analysis import timing
from dyntoken.tools import convert, show
from dyntoken.weights import save_weights
from tests.train.tiny import DTPS, tiny_config

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

NAME = "dtps_vit_mini_patch4_28"
SMALL = ["--set", "width=24", "--set", "depth=3", "--set", "heads=2", "--at=1,2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    model = dyntoken.create_model(NAME, width=24, depth=3, heads=2, at=(1, 2))
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, timing.random_variables(model), model=model)
    return str(path)


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_pictures_of_a_data_set_depend_on_image_and_keep(weights, tmp_path, capsys):
    images = ["fashion_mnist_mini:0", "fashion_mnist_mini:3"]
    assert show.main([NAME, f"--weights={weights}", *SMALL, *images, f"--out={tmp_path / 'a'}"]) == 0
    assert (
        show.main([NAME, f"--weights={weights}", *SMALL, images[0], "--keep=9,4", f"--out={tmp_path / 'b'}"])
        == 0
    )
    out = capsys.readouterr().out.splitlines()
    assert "block 1: 34 of 49 patches kept, 15 absorbed by" in out[0]
    assert "block 2: 4 of 49 patches kept, 45 absorbed by" in out[2]
    first, second = (pixels(tmp_path / "a" / f"fashion_mnist_mini_{i}.png") for i in (0, 3))
    other = pixels(tmp_path / "b" / "fashion_mnist_mini_0.png")
    assert first.shape == second.shape == other.shape
    assert first.shape[1] == pytest.approx((0.07 + 5 * 2.07) * 110, abs=1)  # five panels
    assert (first != second).mean() > 0.02 and (first != other).mean() > 0.02


def test_a_file_is_resized_and_written_where_told(weights, tmp_path):
    path = tmp_path / "colour.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path)
    out = tmp_path / "deep" / "one.png"
    words = [NAME, f"--weights={weights}", *SMALL, str(path), "fashion_mnist_mini:1", f"--out={out}"]
    assert show.main([*words, "--fuse=drop"]) == 0
    assert 450 < pixels(out).shape[0] < 600  # a row per image
    assert show.main([*words, "--fuse=drop", "--colours=16"]) == 0
    assert len(np.unique(pixels(out).reshape(-1, 3), axis=0)) <= 16
    assert show.main([*words, "--colours=300"]) == 1


@pytest.mark.thorough
def test_methods_side_by_side_and_their_page(tmp_path, capsys):
    """A method alone takes its model from the weights; the page has every keep rate."""
    dense = dyntoken.create_model("vit_mini_patch4_28", width=24, depth=3, heads=2)
    weights = tmp_path / "w.safetensors"
    save_weights(weights, timing.random_variables(dense), model=dense)
    page, out = tmp_path / "new" / "page.html", tmp_path / "both.png"
    words = [f"--weights={weights}", "--at=1", "fashion_mnist_mini:2", f"--out={out}", f"--html={page}"]
    assert show.main(["etps", "--vs=evit:fuse=drop", *words, "--rates=0.5,0.9,0.5"]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert "absorbed by" in first and "dropped" in second and "evit:fuse=drop" in second
    assert last.startswith(f"{page}: 1 picture, 2 keep rates")
    packed = re.search(r'json">(.*?)</script>', page.read_text(), re.S)[1]
    data = json.loads(packed)
    assert data["rates"] == [0.9, 0.5] and data["models"] == ["etps", "evit:fuse=drop"]
    kept = [[len({*view["stages"][0]["tokens"]} - {-1}) for view in rates] for rates in data["views"][0]]
    assert kept == [[45, 25], [45, 25]]
    assert show.main(["dtps", *words]) == 1
    assert "parameters of its own" in capsys.readouterr().err
    assert show.main(["etps", *words, "--rates=0.5,2"]) == 1
    assert show.main(["etps", "--vs=vit_mini_patch4_28", *words]) == 1
    assert "vit_mini_patch4_28 is dense" in capsys.readouterr().err


def test_of_many_sites_those_in_the_picture_are_printed():
    row = {"file": "a.png", "model": "tome", "patches": [f"block {n}: x" for n in range(12)]}
    assert show.report([{**row, "drawn": [0, 6, 11]}]) == "a.png: tome: block 0: x; block 6: x; block 11: x"


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """The workdir of one step of a model with one site, where its name alone has three."""
    workdir = tmp_path_factory.mktemp("trained") / "mine"
    model = {"name": DTPS, "width": 8, "depth": 4, "heads": 2, "at": (2,), "keep": 0.5}
    train.run(tiny_config(steps=1, model=model), workdir, log=lambda line: None)
    return workdir


@pytest.mark.thorough
def test_a_run_says_what_its_model_is(own_run, tmp_path, capsys):
    """In the place of NAME, as weights of its own model, and as a file made of it."""
    file, photo = tmp_path / "w.safetensors", tmp_path / "cat.png"
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)  # no patch like another: no ties
    Image.fromarray(noise).save(photo)
    assert convert.main([str(own_run), str(file)]) == 0
    capsys.readouterr()
    said = []
    for words in ([str(own_run)], [DTPS, f"--weights={own_run}"], [str(file)]):
        assert show.main([*words, str(photo), f"--out={tmp_path}", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        said.append(row["patches"])
    assert said[0] == said[1] == said[2] and len(said[0]) == 1
    assert said[0][0].startswith("block 2: 2 of 4 patches kept, 2 absorbed by")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("etp", "unknown model or method 'etp': did you mean etps"),
        ("deit_smal_patch16_224", "did you mean deit_small_patch16_224"),
        ("dtsp_deit_small_patch16_224", "unknown method 'dtsp': did you mean dtps"),
        ("runs/min", "no run in runs/min: give the workdir of a training run"),
        ("none.safetensors", "none.safetensors: no such file"),
    ],
)
def test_a_name_of_nothing(name, message, capsys):
    assert show.main([name, "--weights=w.npz", "cat.jpg"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_file_of_a_dense_model_needs_a_method(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dense = dyntoken.create_model("vit_mini_patch4_28", width=24, depth=3, heads=2)
    save_weights("w.safetensors", timing.random_variables(dense), model=dense)
    assert show.main(["w.safetensors", "fashion_mnist_mini:7"]) == 1
    assert "keeps every token: name METHOD --weights=w.safetensors" in capsys.readouterr().err


def test_a_file_that_is_no_picture(tmp_path, capsys):
    path = tmp_path / "text.png"
    path.write_text("not a picture")
    assert show.main([NAME, "--weights=none.npz", str(path)]) == 1
    assert "not a picture that pillow can read" in capsys.readouterr().err


def test_pixels_are_the_data_sets_and_normalised_with_its_moments():
    model = dyntoken.create_model(NAME)
    picture = show.read("fashion_mnist_mini:5", model)
    batch = next(iter(data.eval_batches("fashion_mnist_mini", batch=8, shards=1)))
    np.testing.assert_array_equal(picture.pixels, batch["image"][5])
    assert picture.label == batch["label"][5]
    seen = np.asarray(picture.preprocess(picture.pixels))
    np.testing.assert_allclose(seen, (picture.pixels / 255.0 - 0.2860) / 0.3530, atol=1e-5)
    told = model.clone(
        prepared=(("mean", (0.5,)), ("std", (0.25,)))
    )  # by weights that were trained with others
    seen = np.asarray(show.read("fashion_mnist_mini:5", told).preprocess(picture.pixels))
    np.testing.assert_allclose(seen, (picture.pixels / 255.0 - 0.5) / 0.25, atol=1e-5)


def test_colour_files_are_normalised_as_imagenet(tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(path)
    model = dyntoken.create_model(NAME, in_chans=3, img_size=32)
    picture = show.read(str(path), model)
    seen = np.asarray(picture.preprocess(picture.pixels))
    np.testing.assert_allclose(seen[7, 9], [2.2489, 2.4286, 2.6400], atol=1e-3)
    given = show.read(str(path), model, "cifar10")
    seen = np.asarray(given.preprocess(given.pixels))
    np.testing.assert_allclose(seen[0, 0, 0], (1 - 0.4914) / 0.2470, rtol=1e-5)


def test_a_cascade_gets_a_row_per_reduced_exit(tmp_path, capsys):
    options = {"width": 16, "depth": 2, "heads": 2, "exits": (2, 4), "at": ((), (1,))}
    model = dyntoken.create_model("dvt_dtps_vit_mini", keep=0.5, **options)
    weights = tmp_path / "w.safetensors"
    save_weights(weights, timing.random_variables(model), model=model)
    more = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    arguments = ["dvt_dtps_vit_mini", f"--weights={weights}", "--keep=0.5", *more, "fashion_mnist_mini:0"]
    assert show.main([*arguments, f"--out={tmp_path / 'a'}"]) == 0
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["fashion_mnist_mini_0.png"]
    told = capsys.readouterr().out
    assert told.count("8 of 16 patches kept, 8 absorbed by") == 1
    assert re.search(r"fashion_mnist_mini_0, exit 1, .* \d+ %", told)  # its class and confidence
