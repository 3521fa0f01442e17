"""The ViTs whose weights people have, small: every variant under methods that need no training.

The default run takes a few pairs; the rest of the product is marked slow.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import optim, weights
from dyntoken.data.resample import resize_centre_one
from dyntoken.models import pairings
from dyntoken.reducers import METHODS, ScoreSelectFuse
from dyntoken.weights import WeightsError

SMALL = {"width": 16, "heads": 2, "depth": 3, "img_size": (12, 20), "patch_size": 4, "num_classes": 5}
GATED = {**SMALL, "mlp_hidden": 24}
VARIANTS = {
    "deit3_small_patch16_224": SMALL,
    "vit_base_patch16_clip_quickgelu_224": SMALL,
    "vit_small_patch14_reg4_dinov2": SMALL,
    "vit_giant_patch14_dinov2": GATED,
    "vit_base_patch16_siglip_224": SMALL,
    "vit_small_plus_patch16_dinov3_qkvb": GATED,
    "eva02_tiny_patch14_224": {**GATED, "rope_grid": (4, 4)},
    "eva02_base_patch16_clip_224": {**GATED, "rope_grid": (4, 4)},
}
COMPOSED = {name: row.plain for name, row in METHODS.items() if issubclass(row.make, ScoreSelectFuse)}
UNTRAINED = [name for name, reducer in COMPOSED.items() if not reducer.learns]
DINOV3, EVA02 = "vit_small_plus_patch16_dinov3_qkvb", "eva02_tiny_patch14_224"
IMAGES = np.random.default_rng(3).normal(size=(2, 12, 20, 3)).astype(np.float32)
run = jax.jit(lambda m, v, x: m.apply(v, x, record=("features",)), static_argnums=0)


def _model(arch, method=None, **options):
    sites = {} if method is None else {"at": (1,)}
    return dyntoken.create_model(
        f"{method}_{arch}" if method else arch, **{**VARIANTS[arch], **sites, **options}
    )


def _random(model):
    """Random weights of some size: right after initialisation the scores nearly tie."""
    rng = np.random.default_rng(0)
    images = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.tree.map(lambda s: rng.normal(s.ndim == 1, 0.3, s.shape).astype(np.float32), shapes)


@functools.cache
def _variables(arch):
    return _random(_model(arch))


def _pairs(*quick):
    pairs = [(arch, m) for arch in VARIANTS for m in UNTRAINED if pairings(arch)[m] is None]
    return [pair if pair in quick else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(
    ("arch", "method"),
    _pairs((DINOV3, "etps"), (EVA02, "evit"), ("vit_small_patch14_reg4_dinov2", "topk")),
)
def test_nothing_reduced_leaves_the_bits_of_the_dense_model(arch, method):
    dense = run(_model(arch), _variables(arch), IMAGES)
    whole = run(_model(arch, method, keep=(15,)), _variables(arch), IMAGES)
    np.testing.assert_array_equal(whole.logits, dense.logits)
    np.testing.assert_array_equal(whole.tokens.x, dense.tokens.x)


@pytest.mark.parametrize(("arch", "method"), _pairs((DINOV3, "evit"), (EVA02, "etps")))
def test_both_forms_agree(arch, method):
    """A kept token keeps its rotation, a fused one has none."""
    kept, masked = (
        run(_model(arch, method, keep=(6,), form=form), _variables(arch), IMAGES)
        for form in ("gather", "mask")
    )
    assert kept.tokens.count == kept.reductions[0].count < masked.tokens.initial == 15
    np.testing.assert_allclose(masked.logits, kept.logits, atol=3e-5)


@pytest.mark.parametrize("arch", VARIANTS)
def test_the_methods_that_fit_take_it(arch):
    """Class attention needs a class token, which SigLIP lacks; all others take all."""
    refused = {method for method in UNTRAINED if pairings(arch)[method] is not None}
    if "siglip" not in arch:
        assert not refused
    for method in ("evit", "topk", "etps"):
        if "siglip" in arch:
            with pytest.raises(ValueError, match="there is none"):
                _model(arch, method)
        else:
            out = jax.eval_shape(_model(arch, method, keep=(6,)).apply, _variables(arch), IMAGES)
            assert out.logits.shape == (2, 5)


def test_dropping_turns_no_other_row():
    """A patch that nothing looks at can go: the rest turn as before, in whatever order they lie."""
    model, variables = _model(DINOV3, "topk", keep=(14,)), _variables(DINOV3)
    decision = jnp.ones((2, 15)).at[:, 4].set(0.0)
    imposed = jax.jit(lambda m, v: m.apply(v, IMAGES, decisions=(decision,)).logits, static_argnums=0)
    gathered, masked = (imposed(model.clone(form=form), variables) for form in ("gather", "mask"))
    np.testing.assert_allclose(gathered, masked, atol=3e-5)


@pytest.mark.thorough
def test_loops_recomputation_and_low_precision():
    """One program for both: gradients of a scanned, rematerialised model against the plain one's."""
    variables = _variables(DINOV3)

    def loss(model, variables):
        return (jax.nn.log_softmax(model.apply(variables, IMAGES).logits) ** 2).mean()

    grad = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
    plain = grad(_model(DINOV3, "evit", keep=(6,), depth=4), _deeper(variables))
    looped = grad(_model(DINOV3, "evit", keep=(6,), depth=4, scan=True, remat=True), _deeper(variables))
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(looped), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    low, full = (
        run(_model(DINOV3, "evit", keep=(6,), dtype=dtype), variables, IMAGES).logits
        for dtype in ("bfloat16", "float32")
    )
    assert low.dtype == jnp.float32 and float(jnp.abs(low - full).max()) < 0.25 * float(jnp.abs(full).max())


def _deeper(variables):
    """The same weights with the last block twice."""
    params = variables["params"]
    trunk = {**params["backbone"]["trunk"], "blocks_3": params["backbone"]["trunk"]["blocks_2"]}
    return {"params": {**params, "backbone": {**params["backbone"], "trunk": trunk}}}


def test_registers_and_biases_do_not_decay():
    params = _variables(DINOV3)["params"]
    groups = optim.groups(params)
    for path in ("backbone/reg_token", "backbone/cls_token", "backbone/trunk/blocks_0/attn/q_bias"):
        assert groups[path].name == "no_decay"
    assert groups["backbone/trunk/blocks_0/mlp/fc1_g/kernel"].name == "decay"


@pytest.mark.parametrize("arch", VARIANTS)
def test_weights_go_out_under_timms_keys_and_back(arch):
    model, variables = _model(arch), _variables(arch)
    tensors = weights.export_reference(model, variables)
    block = {key.removeprefix("blocks.1.") for key in tensors if key.startswith("blocks.1.")}
    back, report = dyntoken.load_weights(model, tensors, strict=True, return_report=True)
    assert not report.resized
    for one, other in zip(jax.tree.leaves(variables), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(one, other)
    if "dinov3" in arch:
        assert {"attn.q_bias", "attn.v_bias", "gamma_1", "mlp.fc1_g.weight", "mlp.fc1_x.weight"} <= block
        assert "reg_token" in tensors and "pos_embed" not in tensors and "attn.qkv.bias" not in block
    if "eva02_base" in arch:
        assert {"attn.q_proj.bias", "attn.k_proj.weight", "attn.norm.weight", "mlp.norm.weight"} <= block
        assert not {"attn.k_proj.bias", "attn.qkv.weight"} & block
    if "siglip" in arch:
        assert tensors["attn_pool.kv.weight"].shape == (32, 16) and tensors["pos_embed"].shape == (1, 15, 16)
    if "deit3" in arch:
        assert "ls1.gamma" in block and tensors["pos_embed"].shape == (1, 15, 16)


def test_another_grid_is_resized_by_the_rule_of_the_name():
    rows = np.random.default_rng(1).normal(size=(1, 17, 16)).astype(np.float32)
    found = {}
    for arch in ("vit_small_patch16_224", "deit_small_patch16_224"):
        model = dyntoken.create_model(arch, **{**SMALL, "depth": 1, "num_classes": 0})
        source = weights.export_reference(model, _random(model)) | {"pos_embed": rows}
        for rule in (None, "timm", "bicubic"):
            variables = dyntoken.load_weights(model, source, resize=rule)
            found[arch[:4], rule] = np.asarray(variables["params"]["backbone"]["pos_embed"])
    np.testing.assert_array_equal(found["vit_", None], found["vit_", "timm"])
    np.testing.assert_array_equal(found["deit", None], found["deit", "bicubic"])
    assert np.abs(found["vit_", "timm"] - found["vit_", "bicubic"]).max() > 0.1


def test_what_is_added_to_prefix_rows_can_lie_in_the_tokens():
    """Official DINOv2 with registers embeds its class token, timm's form of it does not: the same sum."""
    rng = np.random.default_rng(2)
    model = _model("vit_small_patch14_reg4_dinov2", depth=1)
    source = weights.export_reference(model, _random(model))
    official = {**source, "pos_embed": rng.normal(size=(1, 16, 16)).astype(np.float32)}
    params = dyntoken.load_weights(model, official)["params"]["backbone"]
    np.testing.assert_array_equal(params["pos_embed"], official["pos_embed"][:, 1:])
    np.testing.assert_allclose(params["cls_token"], source["cls_token"] + official["pos_embed"][:, :1])
    np.testing.assert_array_equal(params["reg_token"], source["reg_token"])


def test_pixels_that_fill_no_patch():
    options = {**SMALL, "depth": 1, "img_size": (10, 15)}
    with pytest.raises(ValueError, match="not divisible by patch_size"):
        dyntoken.create_model("vit_tiny_patch16_224", **options)
    images = IMAGES[:, :10, :15]
    for rest, grid in (("pad", (3, 4)), ("drop", (2, 3))):
        model = dyntoken.create_model("vit_tiny_patch16_224", **options, rest=rest)
        assert model.plain().grid == grid
        whole = (4 * grid[0], 4 * grid[1])
        other = dyntoken.create_model("vit_tiny_patch16_224", **{**options, "img_size": whole})
        variables = _random(other)
        seen = np.zeros((2, *whole, 3), np.float32)
        seen[:, :10, :15] = images[:, : whole[0], : whole[1]]
        outs = run(model, variables, images).logits, run(other, variables, seen).logits
        np.testing.assert_array_equal(*outs)


def test_preprocessing_of_public_weights():
    for arch, size, crop, mean in (
        ("vit_base_patch16_224", 224, 0.9, 0.5),
        ("vit_base_patch16_384", 384, 1.0, 0.5),
        ("deit3_base_patch16_384", 384, 1.0, 0.485),
        ("vit_large_patch14_dinov2", 518, 1.0, 0.485),
        ("vit_base_patch16_dinov3", 256, 1.0, 0.485),
        ("vit_so400m_patch14_siglip_384", 384, 0.9, 0.5),
        ("vit_base_patch16_clip_224", 224, 0.9, 0.48145466),
        ("eva02_tiny_patch14_336", 336, 1.0, 0.48145466),
    ):
        how = dyntoken.preprocess(dyntoken.create_model(arch))
        assert (how.size, how.crop_pct, how.mean[0]) == ((size, size), crop, mean), arch
    squashing = dyntoken.preprocess(dyntoken.create_model("eva02_base_patch14_448", img_size=(28, 28)))
    wide = np.zeros((28, 56, 3), np.uint8)
    wide[:, 28:] = 255
    seen = np.asarray(squashing(wide))
    assert (np.ptp(seen[:, :10], axis=(0, 1)) < 1e-6).all() and seen[0, 20, 0] > 1 > 0 > seen[0, 5, 0]
    alone = resize_centre_one(wide, (28, 28), 1.0, "bicubic", squash=True)
    assert (alone[:, :10] == 0).all() and (alone[:, 18:] == 255).all()
    named = dyntoken.preprocess(dyntoken.create_model("vit_base_patch16_224"), "imagenet2012")
    assert named.mean[0] == 0.485


EVA = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def test_evas_constructor():
    model = _eva({"swiglu_mlp": True, "qkv_fused": False})
    tensors = weights.export_reference(model, _random(model))
    args = ("timm", "Eva", {**EVA, "swiglu_mlp": True, "qkv_fused": False})
    again, variables = dyntoken.import_reference(*args, tensors)
    assert again == model and again.pool == "mean" and again.fc_norm
    for key, value in weights.export_reference(again, variables).items():
        np.testing.assert_array_equal(value, tensors[key])
    with pytest.raises(WeightsError, match=r"left over: blocks\.0\.attn\.k_bias"):
        dyntoken.import_reference(*args, {**tensors, "blocks.0.attn.k_bias": np.zeros(16, np.float32)})
    assert _eva(
        {"global_pool": "map"}
    ).pool_prefix  # it reads all rows, that of VisionTransformer the patches
    for wrong, message in (
        ({"rope_type": "mixed"}, "only 'cat' or 'dinov3' is implemented"),
        ({"use_post_norm": True}, "the norm comes before each branch"),
        ({"global_pool": "token", "class_token": False}, "needs class_token=True"),
        ({"rope_jitter_coords": 1.5}, "drawn anew in training"),
    ):
        with pytest.raises(WeightsError, match=message):
            _eva(wrong)


def _eva(options):
    return weights.official.build("timm", "Eva", {**EVA, **options}).model
