"""`Predictor`: whatever a batch is made of, one program, the evaluation's pixels, rows that say what failed."""

import io
import pathlib
import pickle

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken.data.files import read_files
from dyntoken.data.resample import resize_centre, resize_centre_one
from tests.tools.exit_run import SMALL

Image = pytest.importorskip("PIL.Image")
TINY = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "num_classes": 5}
NAME = "etps_deit_tiny_patch16_224"
IMAGES = {"img_size": 16, "in_chans": 3, "num_classes": 5}
OPTIONS = {**TINY, "at": (1,), "keep": 0.5}


@pytest.fixture(scope="module")
def model():
    return dyntoken.create_model(NAME, **OPTIONS)


@pytest.fixture(scope="module")
def variables(model):
    return jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Paths of seven pictures of different sizes and kinds; one is none, one is not there."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for number in range(7):
        path, size = folder / f"{number}.{'jpg' if number % 2 else 'png'}", (40, 20 + 9 * number)
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
        coarse.resize(size, Image.Resampling.BILINEAR).save(path, quality=95)
        paths.append(str(path))
    (folder / "2.png").write_bytes(b"no picture")
    return [*paths, str(folder / "absent.png")]


@pytest.fixture(scope="module")
def predictor(model, variables):
    return dyntoken.Predictor(model, variables, batch=3, top=2, class_names=list("abcde"))


@pytest.fixture(scope="module")
def found(predictor, pictures):
    return predictor(pictures)


def test_paths_see_the_pixels_of_the_evaluation(found, predictor, pictures, model, variables):
    how = dyntoken.preprocess(model)
    reading = {"size": how.size, "crop_pct": how.crop_pct, "interpolation": how.interpolation}
    ((images, good),) = read_files(pictures, channels=3, batch=8, **reading)
    np.testing.assert_array_equal(good, [True, True, False, True, True, True, True, False])
    pixels = np.stack([predictor._read(path)[0] for path in np.array(pictures)[good]])
    difference = np.abs(
        pixels.astype(int) - images[good]
    )  # TensorFlow's rows come first, rounded more finely
    assert difference.max() <= 2 and difference.mean() < 0.3
    expected = np.asarray(jax.jit(model.apply)(variables, how(pixels)).logits)
    np.testing.assert_allclose(found["logits"][good], expected, atol=1e-5)
    np.testing.assert_array_equal(found["label"][good], expected.argmax(axis=-1))
    assert found["class"][0] == "abcde"[found["label"][0]] == found["top_class"][0, 0]
    np.testing.assert_allclose(found["probs"][good].sum(axis=-1), 1, atol=1e-6)
    assert found["top_prob"].shape == found["top_label"].shape == (8, 2)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(40, 61, 3), (25, 20, 3), (64, 33, 1), (9, 9, 3)])
def test_one_picture_is_resized_as_a_batch_is(shape, interpolation):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    how = ((24, 16), 0.8, interpolation)
    difference = np.abs(resize_centre_one(image, *how).astype(int) - resize_centre(image[None], *how)[0])
    assert difference.max() <= 1


@pytest.mark.parametrize(
    ("shape", "size"), [((82, 74, 3), (70, 95)), ((100, 75, 3), (56, 56)), ((90, 40, 3), (80, 30))]
)
def test_one_picture_is_resized_columns_first(shape, size):
    """Pillow 13 resizes rows first where they shrink more, and a part of a picture in another order than the whole."""
    image = (
        np.random.default_rng(0).integers(0, 2, shape, np.uint8) * 255
    )  # bicubic overshoots, and is clipped
    for squash in (False, True):
        how = (size, 0.875, "bicubic")
        one = resize_centre_one(image, *how, squash=squash).astype(int)
        assert np.abs(one - resize_centre(image[None], *how, squash=squash)[0]).max() <= 2


def test_stretched_pictures_are_cropped_at_the_centre():
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    whole = resize_centre(image[None], (32, 32), 1.0, "bicubic", squash=True)[0]
    for part in (
        resize_centre(image[None], (24, 24), 0.75, "bicubic", squash=True)[0],
        resize_centre_one(image, (24, 24), 0.75, "bicubic", squash=True),
    ):
        assert np.abs(part.astype(int) - whole[4:28, 4:28]).max() <= 1


def test_what_cannot_be_read_is_a_row_of_its_own(found, predictor, pictures):
    assert [bool(text) for text in found["error"]] == [False, False, True, False, False, False, False, True]
    assert (
        found["error"][2] == f"{pictures[2]}: not a picture that pillow can read"
        and "No such file" in found["error"][7]
    )
    assert found["label"][2] == -1 and found["class"][2] == "" and np.isnan(found["probs"][2]).all()
    only = predictor(pictures[2:3])
    assert only.keys() == found.keys() and only["logits"].shape == (1, 5) and only["error"][0]
    none = predictor([])
    assert {name: column.shape[1:] for name, column in none.items()} == {
        name: column.shape[1:] for name, column in found.items()
    }
    raising = dyntoken.Predictor(predictor.source, predictor.variables, batch=3, on_error="raise")
    with pytest.raises(ValueError, match=r"picture 2: .*2\.png: not a picture"):
        raising(pictures)


def test_bytes_arrays_and_tables_are_the_same_pictures(found, predictor, pictures):
    good = [path for path, error in zip(pictures, found["error"], strict=True) if not error]
    keep = found["error"] == ""
    encoded = [pathlib.Path(path).read_bytes() for path in good]
    decoded = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in encoded]
    ragged = np.empty(len(decoded), object)
    ragged[:] = decoded
    sized = np.stack([predictor._read(path)[0] for path in good])
    how = predictor.opened.preprocess
    for batch in (
        encoded,
        decoded,
        ragged,
        np.array(good),
        sized,
        np.asarray(how(sized)),
        [*sized[:5], np.asarray(how(sized[5]))],
    ):
        np.testing.assert_allclose(predictor(batch)["logits"], found["logits"][keep], atol=1e-5)
    table = predictor({"path": np.array(good), "id": np.arange(6)})
    assert [*table][:2] == ["path", "id"]
    np.testing.assert_array_equal(table["label"], found["label"][keep])
    assert "path" in predictor({"image": ragged, "path": np.array(good)})


def test_a_batch_that_is_none(predictor):
    for batch, said in (
        ("cat.jpg", r"one picture: give a list of them"),
        (np.zeros((16, 16, 3), np.uint8), r"give a batch of images \[B, H, W, C\]"),
        (np.zeros((2, 16, 16, 1), np.uint8), r"an image is \[H, W, 3\], got uint8 \(16, 16, 1\)"),
        (np.zeros((2, 9, 16, 3), np.float32), "float that is normalised and of 16 x 16 pixels"),
        ({"label": np.zeros(3)}, "one must be image or bytes or path"),
    ):
        with pytest.raises(ValueError, match=said):
            predictor(batch)


def test_the_recipe_is_pickled_not_the_weights(tmp_path, model, variables, found, pictures):
    path = tmp_path / "weights.safetensors"
    dyntoken.save_weights(path, variables, model=model)
    lazy = dyntoken.Predictor(str(path), model=NAME, options=OPTIONS, batch=3, features=True, tokens=True)
    again = pickle.loads(pickle.dumps(lazy))
    columns = again(pictures)
    np.testing.assert_allclose(columns["logits"], found["logits"], atol=1e-5)
    assert columns["class"][0].startswith("class ")
    assert columns["pooled"].shape == (8, 16) and columns["tokens"].shape == (8, 9, 16)
    np.testing.assert_array_equal(columns["pooled"][0], columns["tokens"][0, 0])
    assert columns["place"].shape == (8, 8) and columns["carrier"].shape == (8, 16)
    assert np.isnan(columns["pooled"][2]).all() and (columns["place"][2] == -1).all()
    assert len(pickle.dumps(again)) < 1000  # also once it is open
    held = pickle.loads(pickle.dumps(dyntoken.Predictor(model, variables, batch=3)))
    np.testing.assert_allclose(held(pictures[:2])["logits"], found["logits"][:2], atol=1e-5)
    fewer = dyntoken.Predictor(model, variables, batch=3, keep=(3,), tokens=True)(pictures[:2])
    assert fewer["place"].shape == (2, 3)


@pytest.mark.parametrize("normalise", [False, True])
def test_an_export_predicts_alike(normalise, tmp_path, model, variables, found, pictures):
    dyntoken.export(model, variables, tmp_path, ("cpu",), normalise, class_names=list("abcde"))
    columns = dyntoken.Predictor(str(tmp_path), batch=3, top=2)(pictures)
    np.testing.assert_allclose(columns["logits"], found["logits"], atol=1e-5)
    assert columns["class"].tolist() == found["class"].tolist()
    with pytest.raises(ValueError, match="an exported program has logits alone"):
        dyntoken.Predictor(str(tmp_path), keep=0.5)(pictures)


def test_weights_that_say_what_they_are_need_no_name(tmp_path, model, variables, found, pictures):
    path = tmp_path / "weights.safetensors"
    dyntoken.save_weights(path, variables, model=model)
    columns = dyntoken.Predictor(str(path), batch=3)(pictures[:2])
    np.testing.assert_allclose(columns["logits"], found["logits"][:2], atol=1e-5)


def test_early_exits_name_the_exit(pictures):
    model = dyntoken.create_model(
        "dvt_vit_mini", **{**SMALL, "exits": (1, 2), "img_size": 16, "in_chans": 3, "num_classes": 5}
    )
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    how = dyntoken.preprocess(dyntoken.create_model(NAME, **OPTIONS))
    options = {"preprocess": how, "batch": 4}
    early = dyntoken.Predictor(model, variables, thresholds=(0.2,), **options)(pictures[:4])
    late = dyntoken.Predictor(model, variables, thresholds=(2.0, 0.0), **options)(pictures[:4])
    np.testing.assert_array_equal(early["exit"], [0, 0, -1, 0])
    np.testing.assert_array_equal(late["exit"], [1, 1, -1, 1])
    last = dyntoken.Predictor(model, variables, features=True, **options)(pictures[:4])
    np.testing.assert_allclose(late["logits"], last["logits"], atol=1e-5)
    assert last["pooled"].shape == (4, 16) and "exit" not in last


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"on_error": "skip"}, "on_error='skip': give 'mark' or 'raise'"),
        ({"batch": 0}, "must be at least 1"),
        ({"thresholds": (0.5,), "features": True}, "features need thresholds=None"),
    ],
)
def test_options_that_do_not_fit(wrong, said):
    with pytest.raises(ValueError, match=said):
        dyntoken.Predictor("runs/mine", **wrong)


def test_what_shows_when_the_model_opens(model, variables):
    image = [np.zeros((16, 16, 3), np.uint8)]
    dense = dyntoken.create_model("deit_tiny_patch16_224", **TINY)
    for options, said in (
        ({"keep": 0.5}, "is dense here"),
        ({"class_names": ["a"]}, "1 class names for a model of 5"),
    ):
        with pytest.raises(ValueError, match=said):
            dyntoken.Predictor(dense, variables, **options)(image)
    with pytest.raises(ValueError, match="has no exits to leave at"):
        dyntoken.Predictor(model, variables, thresholds=(0.5,))(image)


def test_predict_is_a_predictor_called_once(found, model, variables, pictures):
    once = dyntoken.predict(model, variables, pictures, batch=3, top=2, class_names=list("abcde"))
    assert once.keys() == found.keys()
    for name, column in once.items():
        np.testing.assert_array_equal(column, found[name])
