import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import weights

SMALL = {
    "img_size": 16,
    "patch_size": 2,
    "width": 8,
    "heads": (1, 2),
    "window": 4,
    "depths": (2, 1),
    "num_classes": 5,
}
COUNTS = {
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_base_patch4_window12_384": 87_903_584,
    "dynamicvit_swin_tiny_patch4_window7_224": 29_755_144,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert (
        sum(int(np.prod(shape)) for shape in weights.shapes_of(dyntoken.create_model(name)).values())
        == COUNTS[name]
    )


def _small(**changed):
    return dyntoken.create_model("swin_tiny", **{**SMALL, **changed})


def _filled(model):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *model.input_shape))))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.3, s.shape), s.dtype), shapes)


def test_windows_move_in_odd_blocks_until_one_window_is_the_grid():
    body = _small(depths=(2, 2)).plain()
    assert [body.window_of(stage) for stage in (0, 1)] == [4, 4]
    # Grids of 8 and 4 cells.
    assert [[body.shift_of(stage, index) for index in (0, 1)] for stage in (0, 1)] == [[0, 2], [0, 0]]


def test_an_export_lists_the_official_buffers():
    found = weights.with_buffers(_small(), {})
    mask = found.pop("layers.0.blocks.1.attn_mask")
    assert mask.shape == (4, 16, 16) and set(np.unique(mask)) == {0, -100}
    assert sorted(found) == [
        f"layers.{block}.attn.relative_position_index" for block in ("0.blocks.0", "0.blocks.1", "1.blocks.0")
    ]
    assert all(table.dtype == np.int64 and table.max() == 48 for table in found.values())


def test_a_pixel_reaches_the_neighbouring_window_through_the_second_block_only():
    """The first block keeps to its windows; the second one's windows straddle them, but not the edges."""
    model = _small()
    images = np.random.default_rng(1).normal(size=(1, 16, 16, 3)).astype(np.float32)
    changed = images.copy()
    changed[:, 6:8, 6:8] += 1.0  # cell (3, 3), the inner corner of the first window
    run = jax.jit(lambda v, x: model.apply(v, x, record=("blocks",)).records["blocks"])
    variables = _filled(model)
    moved = [
        np.abs(np.asarray(a - b)).max(axis=-1).reshape(8, 8) > 1e-6
        for a, b in zip(run(variables, images)[:2], run(variables, changed)[:2], strict=True)
    ]
    first, second = np.zeros((2, 8, 8), bool)
    first[:4, :4] = True
    second[:6, :6] = True
    np.testing.assert_array_equal(moved[0], first)
    np.testing.assert_array_equal(moved[1], second)


def test_timm_spells_the_keys_otherwise_and_merges_at_the_start_of_a_layer():
    model = _small(depths=(1, 1, 1), heads=(1, 2, 2), window=2)
    variables = _filled(model)
    official = weights.export_reference(model, variables)
    assert {"layers.0.downsample.reduction.weight", "layers.1.downsample.norm.bias", "head.weight"} < set(
        official
    )
    timm = {}
    for key, value in official.items():
        for stage in (1, 0):
            key = key.replace(f"layers.{stage}.downsample", f"layers.{stage + 1}.downsample!")
        timm[key.replace("!", "").replace("head.", "head.fc.")] = value
    timm["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((4, 4), np.int64)
    for source in (official, timm):
        loaded, report = weights.load_weights(model, source, strict=True, return_report=True)
        assert not report.missing and not report.unexpected
        jax.tree.map(np.testing.assert_array_equal, loaded["params"], variables["params"])


def test_dense_weights_start_the_dynamic_model_and_another_window_resizes_the_bias():
    dense = _small(depths=(1, 1, 2), heads=(1, 2, 2), window=2)
    official = weights.export_reference(dense, _filled(dense))
    model = dyntoken.create_model(
        "dynamicvit_swin_tiny", **{**SMALL, "depths": (1, 1, 2), "heads": (1, 2, 2), "window": 4}, at=(1,)
    )
    loaded, report = weights.load_weights(model, official, return_report=True)
    assert (
        not report.unexpected and len(report.resized) == 2
    )  # the third grid is no larger than either window
    assert {path.split("/")[3].split("_")[0] for path in report.missing} <= {"fastmlp", "predictor"}
    table = loaded["params"]["backbone"]["stage_0"]["blocks_0"]["attn"]["relative_position_bias_table"]
    assert table.shape == (49, 1)
    old = official["layers.0.blocks.0.attn.relative_position_bias_table"].reshape(3, 3)
    np.testing.assert_allclose(table.reshape(7, 7)[3, 3], old[1, 1], atol=1e-6)  # centre stays the centre


def test_errors():
    with pytest.raises(ValueError, match=r"windows of 4 x 4 do not tile: choose img_size \(16, 32\)"):
        _small(img_size=(16, 24))
    with pytest.raises(ValueError, match=r"heads=.*one entry for each"):
        _small(heads=(1,))
    with pytest.raises(ValueError, match="width 8 is not divisible by 3 heads"):
        _small(heads=(3, 3))
    with pytest.raises(weights.WeightsError, match="gives no logits per image"):
        weights.import_reference("timm", "SwinTransformer", {"global_pool": ""}, {})
