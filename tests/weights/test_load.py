"""Weights into a model: round trips, resizing, other heads, and clear refusals."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken import weights
from dyntoken.weights import WeightsError, files

SMALL = {"width": 16, "depth": 2, "heads": 2, "patch_size": 4, "num_classes": 5}
DEIT = "deit_tiny_patch16_224"


def make(name=DEIT, img_size=16, **more):
    return dyntoken.create_model(name, img_size=img_size, **{**SMALL, **more})


def init(model, seed=0):
    """Random values for every parameter, also for those that start at 0 or 1."""
    rng = np.random.default_rng(seed)
    flat = {
        path: rng.normal(size=shape).astype(np.float32) for path, shape in weights.shapes_of(model).items()
    }
    return {"params": files.nest(flat)}


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"name": "dtps_" + DEIT, "at": (1,)},
        {"name": "deit_tiny_distilled_patch16_224"},
        {"layer_scale": 0.1, "representation_size": 8, "qkv_bias": False, "in_chans": 1},
    ],
    ids=["deit", "dtps", "distilled", "scaled"],
)
def test_ours_to_reference_keys_and_back(options):
    model = make(**options)
    variables = init(model)
    exported = weights.export_reference(model, variables)
    same(weights.load_weights(model, exported, strict=True), variables)


def test_reference_keys_and_layouts():
    """timm's names; Linear weights are (out, in), convolutions (out, in, height, width)."""
    model = make("dynamicvit_deit_tiny_distilled_patch16_224", at=(1,), layer_scale=0.1)
    shapes = {key: value.shape for key, value in weights.export_reference(model, init(model)).items()}
    assert shapes["patch_embed.proj.weight"] == (16, 3, 4, 4)
    assert shapes["blocks.1.attn.qkv.weight"] == (48, 16)
    assert shapes["blocks.0.mlp.fc1.weight"] == (64, 16)
    assert shapes["blocks.0.ls1.gamma"] == (16,)
    assert shapes["head_dist.weight"] == (5, 16)
    assert shapes["dist_token"] == (1, 1, 16)
    assert shapes["pos_embed"] == (1, 18, 16)
    assert shapes["score_predictor.0.in_conv.1.weight"] == (16, 16)
    assert shapes["score_predictor.0.out_conv.4.weight"] == (2, 4)
    assert {"norm.weight", "head.bias", "score_predictor.0.in_conv.0.weight"} <= set(shapes)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_files_in_reference_keys(tmp_path, suffix):
    model = make()
    variables = init(model)
    write = files.write_npz if suffix == ".npz" else (lambda path, t: files.write_safetensors(path, t, {}))
    write(tmp_path / f"w{suffix}", weights.export_reference(model, variables))
    same(weights.load_weights(model, tmp_path / f"w{suffix}", strict=True), variables)


def test_own_format(tmp_path):
    model = make()
    variables = init(model)
    weights.save_weights(tmp_path / "w.safetensors", variables, model=model, note="mine")
    bundle = files.read(tmp_path / "w.safetensors")
    assert bundle.own
    assert "backbone/trunk/blocks_0/attn/qkv/kernel" in bundle.tensors
    expected = {"format": "dyntoken", "model": DEIT, "grid": "4x4", "note": "mine"}
    assert {key: value for key, value in bundle.metadata.items() if key != "recipe"} == expected
    same(weights.load_weights(model, tmp_path / "w.safetensors", strict=True), variables)


def test_variables_as_a_source():
    model = make()
    variables = init(model)
    same(weights.load_weights(model, variables, strict=True), variables)


def test_dense_weights_in_a_reducing_model():
    """The predictor starts fresh and the report says so."""
    dense, model = make(), make("dtps_" + DEIT, at=(1,))
    source = init(dense)
    variables, report = weights.load_weights(model, source, return_report=True)
    same(variables["params"]["head"], source["params"]["head"])
    assert "reducer_0" in variables["params"]["backbone"]["trunk"]
    assert all("reducer_0" in path for path in report.missing)
    assert len(report.missing) == 10
    assert not report.unexpected
    assert len(report.loaded) == len(jax.tree.leaves(source))
    assert "10 arrays of the reduction method start fresh" in str(report)
    with pytest.raises(WeightsError, match="strict"):
        weights.load_weights(model, source, strict=True)


def test_reducing_weights_in_a_dense_model_are_reported():
    model, other = make(), make("dtps_" + DEIT, at=(1,))
    exported = weights.export_reference(other, init(other))
    _, report = weights.load_weights(model, exported, return_report=True)
    assert len(report.unexpected) == 10
    assert report.unexpected[0].startswith("score_predictor.0.")
    assert "10 unexpected" in str(report)


def test_buffers_are_no_parameters():
    model = make()
    exported = weights.export_reference(model, init(model))
    exported["bn.num_batches_tracked"] = np.array(3)
    _, report = weights.load_weights(model, exported, strict=True, return_report=True)
    assert report.unexpected == ()


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_position_embedding_of_another_grid(method):
    """The class row is copied; a constant grid stays constant; the others agree with a direct resize."""
    small, large = make(img_size=16), make(img_size=(24, 32))
    source = init(small)
    grid = np.full((1, 16, 16), 0.25, np.float32)
    source["params"]["backbone"]["pos_embed"] = np.concatenate(
        [np.full((1, 1, 16), 7.0, np.float32), grid], axis=1
    )
    variables, report = weights.load_weights(large, source, resize=method, return_report=True)
    pos = np.asarray(variables["params"]["backbone"]["pos_embed"])
    assert pos.shape == (1, 49, 16)
    np.testing.assert_array_equal(pos[:, 0], 7.0)
    np.testing.assert_allclose(pos[:, 1:], 0.25, rtol=1e-6)
    assert report.resized == ("backbone/pos_embed: [1, 17, 16] -> [1, 49, 16]",)


def test_bilinear_resize_by_hand():
    """2x2 to 2x4: half-pixel centres give weights 1, 3/4, 1/4, 0 along the row."""
    small, wide = make(img_size=8), make(img_size=(8, 16))
    source = init(small)
    rows = np.array([9.0, 0.0, 1.0, 4.0, 8.0], np.float32)  # class token, then the grid
    source["params"]["backbone"]["pos_embed"] = np.repeat(rows[None, :, None], 16, axis=2)
    variables = weights.load_weights(wide, source, resize="bilinear")
    got = np.asarray(variables["params"]["backbone"]["pos_embed"])[0, :, 0]
    np.testing.assert_allclose(got, [9.0, 0.0, 0.25, 0.75, 1.0, 4.0, 5.0, 7.0, 8.0], rtol=1e-6)


def test_non_square_source_needs_its_grid(tmp_path):
    wide, square = make(img_size=(8, 16)), make(img_size=16)
    source = init(wide)
    with pytest.raises(WeightsError, match=r"no square grid; pass source_grid="):
        weights.load_weights(square, source)
    given = weights.load_weights(square, source, source_grid=(2, 4))
    weights.save_weights(tmp_path / "w.safetensors", source, model=wide)
    same(weights.load_weights(square, tmp_path / "w.safetensors"), given)


def test_grid_of_the_same_size_but_another_shape(tmp_path):
    """2x4 to 4x2 patches: the number of rows fits, the picture does not."""
    wide, tall = make(img_size=(8, 16)), make(img_size=(16, 8))
    source = init(wide)
    weights.save_weights(tmp_path / "w.safetensors", source, model=wide)
    variables, report = weights.load_weights(tall, tmp_path / "w.safetensors", return_report=True)
    assert len(report.resized) == 1
    old, new = (np.asarray(v["params"]["backbone"]["pos_embed"]) for v in (source, variables))
    assert np.abs(old - new).max() > 0.1


def test_embedding_without_prefix_rows():
    """DeiT-III and TPS add it before the class token: the same as zeros at the class row."""
    model = make()
    exported = weights.export_reference(model, init(model), no_embed_class=True)
    assert exported["pos_embed"].shape == (1, 16, 16)
    variables = weights.load_weights(model, exported)
    pos = np.asarray(variables["params"]["backbone"]["pos_embed"])
    np.testing.assert_array_equal(pos[:, 0], 0)
    np.testing.assert_array_equal(pos[:, 1:], exported["pos_embed"])


def test_distilled_weights_in_a_plain_model():
    plain, distilled = make(), make("deit_tiny_distilled_patch16_224")
    exported = weights.export_reference(distilled, init(distilled))
    variables, report = weights.load_weights(plain, exported, return_report=True)
    assert sorted(report.unexpected) == ["dist_token", "head_dist.bias", "head_dist.weight"]
    assert not report.missing
    pos = np.asarray(variables["params"]["backbone"]["pos_embed"])
    np.testing.assert_array_equal(pos, np.delete(exported["pos_embed"], 1, axis=1))
    np.testing.assert_array_equal(variables["params"]["head"]["cls"]["bias"], exported["head.bias"])
    assert "distillation token and head left out" in str(report)


def test_plain_weights_in_a_distilled_model():
    plain, distilled = make(), make("deit_tiny_distilled_patch16_224")
    source = init(plain)
    variables, report = weights.load_weights(distilled, source, return_report=True)
    assert sorted(report.missing) == ["backbone/dist_token", "head/dist/bias", "head/dist/kernel"]
    old = np.asarray(source["params"]["backbone"]["pos_embed"])
    pos = np.asarray(variables["params"]["backbone"]["pos_embed"])
    np.testing.assert_array_equal(pos[:, 0], old[:, 0])
    np.testing.assert_array_equal(pos[:, 2:], old[:, 1:])
    assert np.isfinite(pos).all()
    assert "start fresh" in str(report)


def test_head_of_other_classes():
    """An error that names keys, shapes and remedy, unless a new head is asked for."""
    source, model = init(make(num_classes=7)), make()
    with pytest.raises(
        WeightsError, match=r"head/cls/bias \[7\] \(model: \[5\]\).*head='reset'.*num_classes=7"
    ):
        weights.load_weights(model, source)
    variables, report = weights.load_weights(model, source, head="reset", return_report=True)
    assert variables["params"]["head"]["cls"]["kernel"].shape == (16, 5)
    assert report.missing == ("head/cls/bias", "head/cls/kernel")
    with pytest.raises(WeightsError, match="choose 'keep' or 'reset'"):
        weights.load_weights(model, source, head="drop")


def test_weights_of_another_width():
    with pytest.raises(
        WeightsError, match=r"weights of another shape: .*\[1, 1, 32\] \(model: \[1, 1, 16\]\).*width"
    ):
        weights.load_weights(make(), init(make(width=32)))


def test_weights_of_another_published_architecture_are_named():
    theirs = dyntoken.create_model("deit_tiny_patch16_32", num_classes=5)
    nothing = {path: np.zeros(shape, np.float32) for path, shape in weights.shapes_of(theirs).items()}
    arrays = weights.export_reference(theirs, {"params": files.nest(nothing)})
    with pytest.raises(
        WeightsError,
        match=r"these are deit_tiny_patch16_32's weights, .* vit_small_patch16_224: name it dtps_deit_tiny_.*=dtps",
    ):
        weights.load_weights(make("dtps_vit_small_patch16_224", at=(1,)), arrays)
    with pytest.raises(WeightsError, match="head='reset'"):  # of the same sizes
        weights.load_weights(dyntoken.create_model("deit_tiny_patch16_32", num_classes=3), arrays)


def test_shapes_come_before_arrays_without_a_place():
    other = make(width=32, layer_scale=0.1)
    wide = weights.export_reference(other, init(other))
    with pytest.raises(WeightsError, match="weights of another shape"):
        weights.load_weights(make(), wide)


def test_weights_of_another_patch_size():
    with pytest.raises(WeightsError, match=r"patch_embed/proj/kernel \[8, 8, 3, 16\].*patch_size"):
        weights.load_weights(make(), init(make(patch_size=8)))


def test_weights_of_another_model():
    with pytest.raises(WeightsError, match="weights of another model: they hold 0 of its 30 backbone arrays"):
        weights.load_weights(make(), {"layer1.0.conv1.weight": np.zeros((4, 3, 3, 3), np.float32)})


def test_missing_arrays_start_like_a_fresh_model():
    model = make()
    source = weights.export_reference(model, init(model))
    del source["norm.weight"]
    variables, report = weights.load_weights(model, source, return_report=True)
    np.testing.assert_array_equal(variables["params"]["backbone"]["norm"]["scale"], 1.0)
    assert report.missing == ("backbone/norm/scale",)


def test_weights_run_on_other_images():
    other = make(img_size=(8, 16))
    variables = weights.load_weights(other, init(make()))
    out = jax.eval_shape(other.apply, variables, np.zeros((2, 8, 16, 3), np.float32))
    assert out.logits.shape == (2, 5)


def test_a_cascade_moves_to_other_classes(tmp_path):
    """Transfer: every exit's head starts fresh, all else is taken over."""
    options = {"img_size": 16, "width": 8, "depth": 1, "heads": 2, "exits": (1, 2)}
    source = dyntoken.create_model("dvt_deit_tiny", num_classes=5, **options)
    variables = init(source)
    weights.save_weights(tmp_path / "source.safetensors", variables, model=source)
    target = dyntoken.create_model("dvt_deit_tiny", num_classes=3, **options)
    with pytest.raises(WeightsError, match=r"head='reset' for a new classifier, or .* num_classes=5"):
        weights.load_weights(target, tmp_path / "source.safetensors")
    moved, report = weights.load_weights(
        target, tmp_path / "source.safetensors", head="reset", return_report=True
    )
    assert report.missing == tuple(f"exit_{i}/head/cls/{what}" for i in (0, 1) for what in ("bias", "kernel"))
    assert moved["params"]["exit_1"]["head"]["cls"]["kernel"].shape == (8, 3)
    same(moved["params"]["exit_0"]["backbone"], variables["params"]["exit_0"]["backbone"])
    same(moved["params"]["reuse_1"], variables["params"]["reuse_1"])


def test_a_cascade_starts_from_a_dense_model():
    """Every exit takes the dense weights; what reuse adds to a layer starts as if it were not there."""
    options = {"width": 16, "depth": 2, "heads": 2}
    dense = dyntoken.create_model("vit_mini_patch4_28", stem="patch", **options)
    source = init(dense)
    model = dyntoken.create_model("dvt_vit_mini", exits=(4, 7), **options)
    variables, report = dyntoken.load_weights(model, {"params": source["params"]}, return_report=True)
    wanted, found = source["params"], variables["params"]
    last = found["exit_1"]["backbone"]
    np.testing.assert_array_equal(last["pos_embed"], wanted["backbone"]["pos_embed"])
    np.testing.assert_array_equal(
        last["patch_embed"]["proj"]["kernel"], wanted["backbone"]["patch_embed"]["proj"]["kernel"]
    )
    block, old = last["trunk"]["blocks_1"], wanted["backbone"]["trunk"]["blocks_1"]
    np.testing.assert_array_equal(block["attn"]["qkv"]["kernel"], old["attn"]["qkv"]["kernel"])
    np.testing.assert_array_equal(block["mlp"]["fc1"]["kernel"][:16], old["mlp"]["fc1"]["kernel"])
    assert not block["mlp"]["fc1"]["kernel"][16:].any() and block["mlp"]["fc1"]["kernel"].shape == (64, 64)
    assert (block["norm2"]["scale"][16:] == 1).all() and block["norm2"]["scale"].shape == (64,)
    np.testing.assert_array_equal(found["exit_0"]["head"]["cls"]["kernel"], wanted["head"]["cls"]["kernel"])
    assert found["exit_0"]["backbone"]["pos_embed"].shape == (1, 17, 16)
    assert "exit_0/backbone/patch_embed/proj/kernel" in report.missing  # 7 x 7 pixels, not 4 x 4
    assert any("every exit starts from them" in note for note in report.notes)
    again = tuple(p for p in report.missing if not p.startswith("reuse_1/"))
    assert set(again) == {f"exit_0/backbone/patch_embed/proj/{leaf}" for leaf in ("kernel", "bias")}
