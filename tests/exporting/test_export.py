"""Exported programs: any batch, without the package, in the forms of their own platform."""

import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken import exporting
from dyntoken.exporting import checking as checks
from dyntoken.exporting import folder as folders
from dyntoken.exporting.programs import programs
from tests.backbones import small as backbones
from tests.exporting.small import model_of, noise, variables_of

NAME = "dtps_deit_tiny_patch16_224"
KEEP = 11  # of 16 patches; the rows of the last block are these and the class token


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of all platforms, the model and its variables."""
    path = tmp_path_factory.mktemp("made") / "dtps"
    model = model_of(NAME)
    variables = variables_of(model)
    dyntoken.export(model, variables, path, class_names=tuple("abcde"))
    return path, model, variables


def test_a_folder_says_what_it_holds(made):
    path, _, variables = made
    about = json.loads((path / "model.json").read_text())
    assert about["model"] == NAME and about["class_names"] == list("abcde")
    assert about["sites"] == [{"block": 1, "keep": KEEP}]
    assert about["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert about["preprocess"]["size"] == [16, 16] and about["normalise"] is False
    (program,) = about["programs"]
    assert program["inputs"] == {"images": {"shape": ["b", 16, 16, 3], "type": "float32"}}
    assert program["outputs"]["logits"] == {"shape": ["b", 5], "type": "float32"}
    assert program["outputs"]["keep_0"] == {"shape": ["b", KEEP], "type": "int32"}
    assert about["versions"]["calling_convention"] >= 9 and about["versions"]["jax"] == jax.__version__
    files = {"model.json", "weights.safetensors", *(f"model.{p}.jax" for p in ("cpu", "cuda", "tpu"))}
    assert {file.name for file in path.iterdir()} == files


def test_files_of_others_are_left_alone(tmp_path):
    """A `model.json` of another program, and a checkpoint under the name that the weights get."""
    model = model_of(NAME)
    variables = variables_of(model)
    about = tmp_path / "a" / "model.json"
    about.parent.mkdir()
    for text in ('{"format": "layers-model", "weightsManifest": []}', "{}", "[1]", "no JSON"):
        about.write_text(text)
        with pytest.raises(ValueError, match=r"model\.json is not of an export: give another folder"):
            dyntoken.export(model, variables, about.parent, ("cpu",))
        assert about.read_text() == text
    kept = tmp_path / "b" / "weights.safetensors"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(ValueError, match=r"weights\.safetensors is there and of no export"):
        dyntoken.export(model, variables, kept.parent, ("cpu",))
    assert [file.name for file in kept.parent.iterdir()] == [kept.name] and kept.read_text() == "mine"
    named = {"weights": "../b/weights.safetensors", "programs": [{"jax": {"cpu": "notes.txt"}, "onnx": None}]}
    named["programs"][0]["inputs"] = {"images": {"type": "float32"}}
    (tmp_path / "a" / "notes.txt").write_text("mine")
    about.write_text(json.dumps(named))
    folders.remove(about.parent)
    assert kept.exists() and (tmp_path / "a" / "notes.txt").exists() and not about.exists()


ALONE = """
import sys
sys.modules["dyntoken"] = sys.modules["flax"] = None  # an import of either is an error
import jax, numpy as np, safetensors.numpy
program = jax.export.deserialize(bytearray(open("model.cpu.jax", "rb").read()))
weights = safetensors.numpy.load_file("weights.safetensors")
results = {}
for name, images in np.load("images.npz").items():
    out = program.call(weights, {"images": images})
    results |= {f"{name}_logits": out["logits"], f"{name}_keep": out["keep_0"]}
np.savez("results.npz", **results)
"""


@pytest.mark.thorough
def test_a_program_runs_without_the_package(made, tmp_path):
    path, model, variables = made
    shutil.copytree(path, tmp_path / "alone")
    images = {f"b{batch}": noise(model, batch) for batch in (1, 7)}
    np.savez(tmp_path / "alone" / "images.npz", **images)
    subprocess.run([sys.executable, "-I", "-c", ALONE], check=True, cwd=tmp_path / "alone", timeout=120)
    results = np.load(tmp_path / "alone" / "results.npz")
    for name, batch in images.items():
        out = jax.jit(model.apply)(variables, batch)
        np.testing.assert_allclose(results[f"{name}_logits"], out.logits, atol=1e-5)
        np.testing.assert_array_equal(results[f"{name}_keep"], out.reductions[0].keep)


def _text(path, platform):
    return folders.read_program(path / f"model.{platform}.jax").mlir_module()


def test_each_platform_has_its_own_forms(made):
    path, *_ = made
    text = {platform: _text(path, platform) for platform in ("cpu", "cuda", "tpu")}
    assert folders.read_program(path / "model.tpu.jax").platforms == ("tpu",)
    sorts = {platform: "stablehlo.sort" in found for platform, found in text.items()}
    assert sorts == {"cpu": True, "cuda": True, "tpu": False}
    rows = f"tensor<?x{KEEP}x16xf32>"
    gathers = {p: bool(re.search(rf"gather.*-> {re.escape(rows)}", found)) for p, found in text.items()}
    assert gathers == {"cpu": True, "cuda": True, "tpu": False}  # there it is a product with one-hot rows


def test_rows_really_shrink(made):
    path, *_ = made
    for platform in ("cpu", "cuda", "tpu"):
        products = [line for line in _text(path, platform).splitlines() if "dot_general" in line]
        rows = [re.search(r"tensor<\?x(\d+)x(?:48|64)xf32>", line) for line in products]  # qkv, MLP's two
        wide = 2 if platform == "tpu" else 3  # queries, keys and values are three products there
        assert [int(row[1]) for row in rows if row] == [17] * wide + [1 + KEEP] * wide


def test_check_agrees_and_notices(made, tmp_path):
    path, model, variables = made
    found = exporting.check(path, model, variables, batches=(7,))
    assert [one.how for one in found] == ["jax", *[checks.ELSEWHERE] * 2]
    assert all(one.agrees and one.sets and one.error < 1e-5 and not one.ties for one in found)
    shutil.copytree(path, tmp_path / "other")
    other = jax.tree.map(lambda leaf: leaf * 1.01, variables)
    dyntoken.save_weights(tmp_path / "other" / "weights.safetensors", other)
    assert not exporting.check(tmp_path / "other", model, variables, batches=(7,))[0].agrees


def test_what_counts_as_equal():
    scores = np.array([[0.9, 0.5, 0.5 - 1e-7, 0.1]], np.float32)
    own = {"logits": np.array([[1.0, 2.0]]), "keep_0": np.array([[0, 1]]), "scores_0": scores}

    def compared(logits, keep):
        return checks.compare("f", "jax", {"logits": np.array([logits]), "keep_0": np.array([keep])}, own)

    same = compared([1.0, 2.1], [1, 0])
    assert same.sets and not same.ties and same.error == pytest.approx(0.05) and not same.agrees
    near = compared([1.0, 2.001], [1, 0])  # as when a dropped row goes to another host
    assert near.sets and near.ties == 1 and near.error == 0
    dense = checks.compare("f", "jax", {"logits": np.array([[1.0, 2.001]])}, {"logits": own["logits"]})
    assert not dense.ties and dense.error == pytest.approx(0.0005) and not dense.agrees
    assert compared([1.0, 2.0001], [0, 1]).agrees
    tie = compared([5.0, 5.0], [0, 2])  # rows 1 and 2 score alike: no disagreement, and nothing is learnt
    assert tie.sets and tie.ties == 1 and tie.error == 0
    (line,) = exporting.disagreements([tie])
    assert "ties in 1 of 1 images are too many" in line
    assert exporting.disagreements([tie, *[compared([1.0, 2.0], [0, 1])] * 3]) == []
    assert not compared([1.0, 2.0], [0, 3]).sets
    assert not compared([1.0, np.nan], [0, 1]).agrees


def test_rows_are_compared_by_their_cells():
    """Two equal scores that swap at site 0 rename the rows of site 1."""
    own = {"logits": np.array([[1.0, 2.0]]), "keep_0": np.array([[3, 1, 0]]), "keep_1": np.array([[0, 1]])}
    own |= {"scores_0": np.array([[0.5, 0.5, 0.1, 0.9]]), "scores_1": np.array([[0.9, 0.5, 0.1]])}
    swapped = {**own, "keep_0": np.array([[3, 0, 1]]), "keep_1": np.array([[0, 2]])}
    found = checks.compare("f", "jax", swapped, own)
    assert found.sets and not found.ties and found.agrees
    assert not checks.compare("f", "jax", {**swapped, "keep_1": np.array([[0, 1]])}, own).sets


def test_pixels_are_normalised_inside(tmp_path):
    model = model_of("deit_tiny_patch16_224")
    variables = variables_of(model)
    how = dyntoken.preprocess(model)
    dyntoken.export(model, variables, tmp_path, ("cpu",), normalise=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    loaded = dyntoken.load_export(tmp_path)
    assert loaded.preprocess == how
    got = loaded(pixels)["logits"]
    np.testing.assert_allclose(got, jax.jit(model.apply)(variables, how(pixels)).logits, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["dvt_dtps_deit_small", "multiexit_deit_tiny_patch16_224"])
def test_exits_hand_on(name, tmp_path):
    model = model_of(name)
    variables = variables_of(model)
    dyntoken.export(model, variables, tmp_path, ("cpu",))
    loaded = dyntoken.load_export(tmp_path)
    images = noise(model, 3)
    want = jax.jit(model.apply)(variables, images)
    got = loaded(images)
    np.testing.assert_allclose(got["logits"], want.logits, atol=1e-5)
    assert len(want.reductions) == sum(key.startswith("keep_") for key in got)
    for number, site in enumerate(want.reductions):
        np.testing.assert_array_equal(got[f"keep_{number}"], site.keep)
    first = loaded.step({"images": images})
    np.testing.assert_allclose(first["logits"], want.logits[0], atol=1e-5)
    handed = {key.removeprefix("next_"): rows for key, rows in first.items() if key.startswith("next_")}
    assert {*handed} == {*loaded.about["programs"][1]["inputs"]} - {"images"} and handed
    assert loaded(images, upto=0)["logits"].shape == (1, 3, 5)


@pytest.mark.thorough
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("name", backbones.names(object))
def test_every_backbone_takes_a_symbolic_batch(name, platform):
    model = model_of(name)
    with dyntoken.ops.backend.trace_for(platform):
        (program,) = programs(model, folders.flat_variables(variables_of(model)), None)
    assert [str(size) for size in program.outputs["logits"].shape] == ["b", "5"]


def test_a_later_export_replaces_an_earlier_one(tmp_path):
    model = model_of("deit_tiny_patch16_224")
    variables = variables_of(model)
    dyntoken.export(model, variables, tmp_path / "here", ("cpu", "tpu"))
    (tmp_path / "here" / "mine.txt").touch()
    dyntoken.export(model, variables, tmp_path / "here", ("cuda",))
    names = {"mine.txt", "model.cuda.jax", "model.json", "weights.safetensors"}
    assert {file.name for file in (tmp_path / "here").iterdir()} == names
    with pytest.raises(ValueError, match=r"no jax program for cpu, but for cuda: export it for cpu, too"):
        dyntoken.load_export(tmp_path / "here")
    folders.remove(tmp_path / "here")
    assert [file.name for file in (tmp_path / "here").iterdir()] == ["mine.txt"]


def test_bad_input_is_named(tmp_path):
    model = model_of("deit_tiny_patch16_224")
    variables = variables_of(model)
    for options, message in (
        ({"platforms": ("gpu",)}, "unknown platform 'gpu': .*cpu"),
        ({"platforms": ()}, "no platform to export for: give some of cpu, cuda, rocm, tpu"),
        ({"formats": ("onx",)}, "unknown format 'onx': did you mean onnx"),
        ({"class_names": ("a",)}, "1 class names for 5 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            dyntoken.export(model, variables, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=r"holds no export \(no model.json\)"):
        dyntoken.load_export(tmp_path)


def test_an_older_jax_says_which_one_wrote_the_file():
    """The very words of jax 0.9.0 on a file of 0.10.2; any other error stays as it is."""

    class Program:
        words = "INVALID_ARGUMENT: Failed to deserialize StableHLO"

        def call(self, weights, inputs):
            raise jax.errors.JaxRuntimeError(self.words)

    found = folders.Exported({"versions": {"jax": "0.10.2"}}, (Program(),), {})
    with pytest.raises(ValueError, match=r"written by jax 0\.10\.2, which this jax .* cannot read"):
        found.step({})
    Program.words = "INTERNAL"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        found.step({})
