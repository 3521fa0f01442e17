import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import weights

SMALL = {
    "img_size": 16,
    "patch_size": 2,
    "widths": (4, 8, 8),
    "kernel": 3,
    "depths": (1, 1, 2),
    "num_classes": 5,
}
COUNTS = {
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "dynamicvit_convnext_tiny": 30_504_814,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert (
        sum(int(np.prod(shape)) for shape in weights.shapes_of(dyntoken.create_model(name)).values())
        == COUNTS[name]
    )


def _filled(model):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *model.input_shape))))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.3, s.shape), s.dtype), shapes)


TIMM = (
    ("downsample_layers.0.", "stem."),
    ("downsample_layers.1.", "stages.1.downsample."),
    ("downsample_layers.2.", "stages.2.downsample."),
    ("dwconv", "conv_dw"),
    ("pwconv", "mlp.fc"),
    ("head.", "head.fc."),
)


def test_official_and_timm_keys_load():
    model = dyntoken.create_model("convnext_tiny", **SMALL)
    variables = _filled(model)
    official = weights.export_reference(model, variables)
    assert official["stages.0.0.dwconv.weight"].shape == (4, 1, 3, 3)
    assert {"downsample_layers.0.1.weight", "stages.2.1.gamma", "norm.bias", "head.weight"} < set(official)
    timm = {}
    for key, value in official.items():
        parts = key.split(".")
        if parts[0] == "stages":
            key = ".".join(["stages", parts[1], "blocks", *parts[2:]])
        key = f"head.{key}" if parts[0] == "norm" else key
        for ours, theirs in TIMM if parts[0] != "norm" else ():
            key = key.replace(ours, theirs)
        timm[key] = value
    for source in (official, timm):
        loaded = weights.load_weights(model, source, strict=True)
        jax.tree.map(np.testing.assert_array_equal, loaded["params"], variables["params"])


def test_the_dynamic_model_exports_its_predictors_as_convolutions():
    model = dyntoken.create_model("dynamicvit_convnext_tiny", **SMALL, at=(1,), keep=0.5)
    variables = _filled(model)
    official = weights.export_reference(model, variables)
    assert official["score_predictor.0.in_conv.1.weight"].shape == (8, 8, 1, 1)
    assert official["score_predictor.0.in_conv.0.weight"].shape == (8,)
    assert {"stages.2.1.fast_path.0.bias", "stages.2.1.fast_path_gamma"} < set(official)
    assert "stages.2.0.fast_path_gamma" not in official
    loaded = weights.load_weights(model, official, strict=True)
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], variables["params"])
    dense = dyntoken.create_model("convnext_tiny", **SMALL)
    _, report = weights.load_weights(
        model, weights.export_reference(dense, _filled(dense)), return_report=True
    )
    assert (
        not report.unexpected
        and report.missing
        and all("/fast_path_" in path or "/reducer_0/" in path for path in report.missing)
    )


def test_the_classifier_reads_the_norm_of_the_mean():
    model = dyntoken.create_model("convnext_tiny", **SMALL)
    variables = _filled(model)
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    out = jax.jit(lambda v: model.apply(v, images, record=("features", "blocks")))(variables)
    mean = np.asarray(out.records["blocks"][-1]).mean(axis=1)
    norm, head = variables["params"]["backbone"]["norm"], variables["params"]["head"]["cls"]
    centred = (mean - mean.mean(axis=1, keepdims=True)) / np.sqrt(mean.var(axis=1, keepdims=True) + 1e-6)
    pooled = centred * norm["scale"][None] + norm["bias"][None]
    np.testing.assert_allclose(out.tokens.x[:, 0], pooled, atol=2e-5)
    np.testing.assert_allclose(out.logits, pooled @ head["kernel"] + head["bias"][None], atol=1e-4)


def test_errors():
    with pytest.raises(ValueError, match="kernel=4 must be odd"):
        dyntoken.create_model("convnext_tiny", kernel=4)
    with pytest.raises(ValueError, match=r"widths=.*one entry for each"):
        dyntoken.create_model("convnext_tiny", widths=(4, 8))
    with pytest.raises(weights.WeightsError, match="output_stride=16"):
        weights.import_reference("timm", "ConvNeXt", {"output_stride": 16}, {})
    for patch in (2, 8):  # their last grids are others than those of 4
        with pytest.raises(weights.WeightsError, match=f"patch_size={patch}: "):
            weights.import_reference("timm", "ConvNeXt", {"patch_size": patch}, {})
