"""SPViT: the package token, that it stays, and how many rows there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import losses
from dyntoken.ops import fuse
from dyntoken.types import Output, Reduction
from dyntoken.weights import WeightsError, load_weights

SMALL = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 5}
SITES = {"at": (0, 1, 2), "keep": (10, 6, 3)}
IMAGES = np.random.default_rng(5).normal(size=(2, 16, 16, 3)).astype(np.float32)


def test_the_package_is_a_mean_or_as_in_the_code_a_sum():
    x = jnp.asarray([[[1.0], [3.0], [5.0]]])
    weights = {"importance": jnp.asarray([[0.5, 0.25, 0.25]]), "weight": jnp.asarray([[1.0, 1.0, 0.0]])}
    np.testing.assert_allclose(fuse.package(x, x, **weights).extra, [[[1.25 / 0.75]]], rtol=1e-6)
    np.testing.assert_allclose(fuse.package_sum(x, x, **weights).extra, [[[1.25]]], rtol=1e-6)
    nobody = {**weights, "weight": jnp.zeros((1, 3))}
    np.testing.assert_array_equal(fuse.package(x, x, **nobody).extra, [[[0.0]]])


@pytest.mark.thorough
def test_packages_are_kept_on_top_of_the_patches():
    model = dyntoken.create_model("spvit_deit_tiny_patch16_224", **SMALL, **SITES)
    options = [site.reducer for site in model.sites()]
    assert [(o["current"], o["keep"]) for o in options] == [(16, 10), (11, 7), (8, 5)]
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    out = jax.jit(lambda v, x: model.apply(v, x, record=("features",)))(variables, IMAGES)
    assert [r.count for r in out.reductions] == [11, 8, 6]
    assert ((out.tokens.place < 0).sum(axis=1) == 3).all() and (out.tokens.carrier >= 0).all()
    assert np.isposinf(out.reductions[2].scores).sum() == 4  # two packages in each image


def test_noise_in_evaluation_samples_in_the_mask_form():
    model = dyntoken.create_model("spvit_deit_tiny_patch16_224", **SMALL, **SITES, form="mask")
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    noise = [jnp.zeros((2, 16 + s, 2)).at[:, s:, 1].set(50.0).at[:, :s, 0].set(50.0) for s in range(3)]
    out = jax.jit(lambda v, n: model.apply(v, IMAGES, noise=n))(variables, noise)
    np.testing.assert_array_equal(
        [r.decision[:, :16].sum(axis=1) for r in out.reductions], [[0, 0], [0, 0], [0, 0]]
    )
    np.testing.assert_array_equal(out.reductions[2].decision[:, 16:], np.ones((2, 2)))
    assert np.isfinite(out.logits).all()


def test_the_ratio_counts_patches_alone():
    decision = jnp.asarray([[1.0, 0.0, 0.0, 0.0, 1.0]])
    site = Reduction(*[jnp.zeros((1, 5))] * 1, decision, *[None] * 3, ratio=0.25, grid=(2, 2))
    value, _ = losses.LOSSES["keep_ratio"](Output(jnp.zeros((1, 3)), reductions=(site,)), {})
    assert float(value) == 0.0


def test_the_network_of_the_heads_is_read_once_and_must_be_one(tmp_path):
    from safetensors.numpy import save_file

    model = dyntoken.create_model("spvit_deit_tiny_patch16_224", **SMALL, at=(1,), keep=0.5)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    own = dyntoken.weights.export_reference(model, variables)
    shared = [key for key in own if "_conv.0." in key]
    assert len(shared) == 10 and "score_predictor.0.senet.2.weight" in own
    again = {key.replace("_conv.0.", "_conv.1."): own[key] for key in shared}
    save_file({**own, **again}, tmp_path / "same.safetensors")
    loaded = load_weights(model, tmp_path / "same.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    constructor = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    constructor |= {"num_classes": 5, "pruning_loc": [1], "token_ratio": [0.5]}
    source = ("PeiyanFlying/SPViT", "VisionTransformerDiffPruning", constructor)
    official, _ = dyntoken.import_reference(*source, {**own, **again})
    assert dict(official.method_options)["fuse"] == "package_sum"
    key = next(iter(again))
    with pytest.raises(WeightsError, match="left over: score_predictor"):
        dyntoken.import_reference(*source, {**own, **again, key: again[key] + 1})


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="3 heads do not divide the 16 channels"):
        model = dyntoken.create_model("spvit_deit_tiny_patch16_224", **{**SMALL, "at": (1,)}, keep=4)
        jax.eval_shape(lambda: model.clone(method_options=(("heads", 3),)).init(jax.random.key(0), IMAGES))
