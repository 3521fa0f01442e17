"""How a checkpoint's images were prepared: read off the files beside it, kept in the model, said in the report."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

import dyntoken
from dyntoken import exporting, preprocessing, train, weights
from dyntoken.checkpoints import Checkpoints
from dyntoken.tools import convert, predict, show
from dyntoken.train import start
from dyntoken.weights import pixels
from tests.train.tiny import DTPS, tiny_config
from tests.weights import made

HALF, IMAGENET = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
DINOV2 = {  # as facebook/dinov2-small has it
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_rescale": True,
    "image_mean": list(IMAGENET),
    "image_processor_type": "BitImageProcessor",
    "image_std": list(HALF),
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}
OLD = {"image_mean": list(HALF), "image_std": list(HALF), "resample": 2, "size": 224}


@pytest.mark.parametrize(
    ("processor", "want", "size"),
    [
        (
            DINOV2,
            {"mean": IMAGENET, "std": HALF, "crop_pct": 0.875, "squash": False, "interpolation": "bicubic"},
            (224, 224),
        ),
        (  # a plain number is both sides for ViT and the shorter one for CLIP
            OLD | {"feature_extractor_type": "ViTFeatureExtractor"},
            {"mean": HALF, "std": HALF, "crop_pct": 1.0, "squash": True, "interpolation": "bilinear"},
            (224, 224),
        ),
        (
            OLD
            | {"feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True, "crop_size": 224},
            {"mean": HALF, "std": HALF, "crop_pct": 1.0, "squash": False, "interpolation": "bilinear"},
            (224, 224),
        ),
        (  # DeiT's stretches to 256 pixels before it crops
            OLD
            | {
                "feature_extractor_type": "DeiTFeatureExtractor",
                "size": 256,
                "do_center_crop": True,
                "crop_size": 224,
            },
            {"mean": HALF, "std": HALF, "crop_pct": 0.875, "squash": True, "interpolation": "bilinear"},
            (224, 224),
        ),
        ({"do_normalize": False, "image_mean": list(HALF)}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}, None),
        (  # pixels from 0 to 2
            {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
            {"mean": pytest.approx(HALF), "std": pytest.approx(HALF)},
            None,
        ),
        (
            {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3},
            {"mean": pytest.approx(HALF), "std": pytest.approx((0.2,) * 3)},
            None,
        ),
    ],
)
def test_words_of_transformers(processor, want, size):
    told = pixels.told({"architecture": "vit_small_patch16_224", "mean": [0.1] * 3}, processor)
    assert (told.fields, told.size, told.file) == (want, size, "preprocessor_config.json")


def test_words_of_timm():
    cfg = {"mean": list(IMAGENET), "std": list(HALF), "interpolation": "bicubic", "crop_pct": 0.9}
    cfg |= {"crop_mode": "squash", "input_size": [3, 32, 48]}
    told = pixels.told({"architecture": "vit_small_patch16_224", "pretrained_cfg": cfg}, {})
    assert told.fields == {
        "mean": IMAGENET,
        "std": HALF,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "squash": True,
    }
    assert (told.size, told.file) == ((32, 48), "config.json")
    assert pixels.told({"model_type": "vit"}, {}) == pixels.Pixels()
    other = pixels.told({}, DINOV2 | {"resample": 1})
    assert (
        "interpolation" not in other.fields
        and "resizing by 1, which is not done" in other.lines((224, 224))[-1]
    )


@pytest.mark.parametrize("squash", [False, True])
def test_a_preprocessing_is_written_and_read_back(squash):
    how = dyntoken.preprocess(made.model(prepared=(("squash", squash), ("crop_pct", 0.5))))
    told = pixels.told({}, pixels.processor_of(how))
    assert told.size == how.size
    assert told.fields == {name: getattr(how, name) for name in pixels.FIELDS}


@pytest.fixture
def folder(tmp_path):
    model = made.model(num_classes=0, norm_eps=1e-12)
    tensors, config = weights.to_transformers(model, made.variables(model))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(DINOV2))
    return tmp_path


def test_they_go_with_the_model(folder, tmp_path):
    model, variables, report = dyntoken.load_pretrained(folder, return_report=True)
    how = dyntoken.preprocess(model)
    assert (how.size, how.mean, how.std, how.crop_pct) == ((16, 16), IMAGENET, HALF, 0.875)
    line = next(note for note in report.notes if note.startswith("images are prepared"))
    assert "as preprocessor_config.json says: " in line and line.endswith(
        "; of 224x224 pixels, here of 16x16"
    )
    plain = made.model(num_classes=0, norm_eps=1e-12)
    assert dyntoken.preprocess(plain).mean == HALF  # AugReg's
    assert dyntoken.preprocess(weights.prepared(plain, folder)) == how
    assert weights.prepared(plain, variables) is plain
    weights.save_weights(tmp_path / "ours.safetensors", variables, model=model)
    assert dyntoken.load_pretrained(tmp_path / "ours.safetensors")[0].prepared == model.prepared
    assert dyntoken.preprocess(dyntoken.load_pretrained(folder, in_chans=1)[0], None).channels == 1


def test_a_predictor_reads_the_folder(folder):
    """By its architecture or under a model's name, the same pixels."""
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    found = dyntoken.Predictor(folder, batch=1)([picture])["pooled"]
    model, variables = dyntoken.load_pretrained(folder)
    np.testing.assert_allclose(dyntoken.predict(model, variables, [picture], batch=1)["pooled"], found)
    ready = dyntoken.preprocess(model)(picture)[None]
    np.testing.assert_allclose(model.apply(variables, ready).logits, found, atol=2e-5)
    options = {**made.SMALL, "num_classes": 0, "norm_eps": 1e-12}
    named = dyntoken.Predictor(folder, model="vit_small_patch16_224", options=options, batch=1)
    assert named.opened.preprocess == dyntoken.preprocess(model)


NAMES = tuple("abcdefg")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir whose pixels are no model's default: mean, deviation, crop and kernel are the config's."""
    here = {"mean": HALF, "std": (0.1, 0.2, 0.3), "eval": {"crop_pct": 0.5, "interpolation": "bilinear"}}
    config = tiny_config(model__name=DTPS, model__depth=2, model__at=(1,), data__size=24)
    config["data"].update(here)
    plan = train.build(config)
    workdir = tmp_path_factory.mktemp("pixels") / "run"
    checkpoints = Checkpoints(workdir)
    about = plan.description | {"class_names": NAMES}
    checkpoints.save(0, plan.new_state(), config=plan.settings.plain, run=about, seconds=0.0)
    checkpoints.close()
    return workdir


def test_those_of_a_run_go_with_it(run, tmp_path):
    """However it is read; and with what is written of it: ours, timm's keys, an export."""
    opened = dyntoken.load_run(run)
    how = opened.preprocess
    assert how == preprocessing.Preprocess((24, 24), 3, HALF, (0.1, 0.2, 0.3), 0.5, "bilinear")
    model, variables, report = dyntoken.load_pretrained(run, return_report=True)
    assert dyntoken.preprocess(model) == dyntoken.preprocess(opened.model) == how
    assert model == opened.model and weights.class_names(run) == NAMES
    assert any(note.startswith("images are prepared as the run says: mean=(0.5, ") for note in report.notes)
    bare = model.clone(prepared=())
    assert dyntoken.preprocess(bare) != how == dyntoken.preprocess(weights.prepared(bare, run))
    ours, timm = tmp_path / "ours.safetensors", tmp_path / "timm.safetensors"
    assert convert.main([str(run), str(ours)]) == convert.main([str(run), str(timm), "--to=timm"]) == 0
    exporting.export(bare, variables, tmp_path / "out", preprocess=how, class_names=NAMES, platforms=["cpu"])
    for path in (ours, timm, tmp_path / "out" / "weights.safetensors"):
        assert dyntoken.preprocess(weights.prepared(bare, path)) == how
        assert weights.class_names(path) == NAMES
    again, _, report = dyntoken.load_pretrained(ours, return_report=True)
    assert again == model
    assert any(note.startswith("images are prepared as ours.safetensors says") for note in report.notes)
    found = dyntoken.Predictor(ours).opened
    assert (found.preprocess, found.class_names) == (how, NAMES)
    assert dyntoken.load_pretrained(run, in_chans=1, img_size=32)[0].input_shape == (32, 32, 1)


def test_what_a_run_leaves_open_is_the_evaluations_default(run):
    """Not that of the model's name, which crops otherwise."""
    from dyntoken.weights import runs

    about = {"mean": HALF, "std": HALF, "image_shape": [24, 32, 3]}
    assert runs.of_images({"run": about}) == {
        "prepared": {
            "mean": HALF,
            "std": HALF,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "squash": False,
        },
        "class_names": [],
        "size": (24, 32),
    }
    fields = preprocessing.Preprocess((24, 32), 3, HALF, HALF)
    assert pixels.of_own(runs.of_images({"run": about}), "").fields == {
        name: getattr(fields, name) for name in pixels.FIELDS
    }
    assert runs.of_images({"config": {}}) == {}


def test_training_says_where_its_pixels_are_others(run):
    config = tiny_config(model__name=DTPS, model__depth=2, model__at=(1,), data__size=24)
    config["init"] = {"path": str(run), "head": "reset"}
    lines = []
    start.load_init(train.build(config), lines.append)
    wanted = "had pixels of another std: --config.data.std=0.1,0.2,0.3 gives it the same"
    assert [line.endswith(wanted) for line in lines if line.startswith("warning")] == [True]  # means agree
    config["data"].update({"mean": HALF, "std": (0.1, 0.2, 0.3)})
    lines.clear()
    start.load_init(train.build(config), lines.append)
    assert len(lines) == 1


@pytest.mark.thorough
def test_show_says_what_predict_says(run, tmp_path, capsys):
    """Of the run, of its weights under a model's name, and of a converted file."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    image.fromarray(coarse).resize((50, 40)).save(tmp_path / "p.png")
    picture, ours = str(tmp_path / "p.png"), str(tmp_path / "ours.safetensors")
    assert convert.main([str(run), ours]) == 0
    capsys.readouterr()
    assert predict.main([picture, f"--workdir={run}", "--json"]) == 0
    top = json.loads(capsys.readouterr().out)["predictions"][0]["classes"][0]
    assert predict.main([picture, f"--weights={ours}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["classes"][0] == top
    sizes = ["--set", "width=8", "--set", "depth=2", "--set", "heads=2", "--set", "num_classes=7"]
    named = [DTPS, f"--weights={run}", "--at=1", "--img_size=24", *sizes]
    for words in ([str(run)], named, ["dtps", f"--weights={ours}"]):
        assert show.main([*words, picture, f"--out={tmp_path}"]) == 0
        said = re.search(r"(\w+), (\d+) %", capsys.readouterr().out)
        assert said.groups() == (top["class"], f"{100 * top['probability']:.0f}")
