"""LV-ViT: both heads, MixToken, weights by the official names, the published sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import weights
from dyntoken.analysis import macs
from dyntoken.ops import mixing

TINY = {
    "img_size": 16,
    "patch_size": 4,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "stem_width": 4,
    "num_classes": 5,
}
IMAGES = np.random.default_rng(7).normal(size=(4, 16, 16, 3)).astype(np.float32)
SLOW = pytest.mark.slow
RNGS = {"policy": jax.random.key(1), "dropout": jax.random.key(2)}


def _model(name="lvvit_s", **options):
    return dyntoken.create_model(name, **{**TINY, **options})


@functools.cache
def _variables(name="lvvit_s"):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: _model(name).init(jax.random.key(0), IMAGES[:1]))
    tree = jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.15, s.shape), s.dtype), shapes)
    return {**tree, "batch_stats": jax.tree.map(jnp.abs, tree["batch_stats"])}


def _heads(x):
    """Class logits and auxiliary logits of final rows, by hand."""
    params = jax.tree.map(np.asarray, _variables()["params"])
    cls, aux = params["head"]["cls"], params["aux_head"]
    return x[:, 0] @ cls["kernel"] + cls["bias"], x[:, 1:] @ aux["kernel"] + aux["bias"]


def test_evaluation_adds_half_the_largest_auxiliary_logit_and_training_does_not():
    model = _model(frozen_stats=True)  # so that both see the same rows
    run = jax.jit(
        lambda v, train: model.apply(v, IMAGES, train=train, record=("dense", "features")), static_argnums=1
    )
    for train in (False, True):
        out = run(_variables(), train)
        cls, aux = _heads(np.asarray(out.tokens.x))
        np.testing.assert_allclose(out.dense, aux, atol=1e-5)
        np.testing.assert_allclose(out.logits, cls + (0.0 if train else 0.5 * aux.max(axis=1)), atol=1e-5)


def test_mix_token_swaps_a_box_between_pairs():
    model, variables = _model(mix_token=True), _variables()
    options = {"train": True, "record": ("embed",)}
    run = jax.jit(lambda key: model.apply(variables, IMAGES, rngs={"dropout": key}, **options))
    outs = [run(jax.random.key(seed)) for seed in range(12)]
    plain = next(np.asarray(o.records["embed"]) for o in outs if not o.mixed.any())  # an empty box
    for out in outs:
        inside = np.asarray(out.mixed)
        assert (inside == inside[0]).all()  # one box for the whole batch
        expected = np.where(inside[..., None], plain[[1, 0, 3, 2], 1:], plain[:, 1:])
        np.testing.assert_allclose(out.records["embed"][:, 1:], expected, atol=1e-6)
    assert max(out.mixed.mean() for out in outs) >= 0.25
    with pytest.raises(ValueError, match="even number of images, not 3"):
        model.apply(_variables(), IMAGES[:3], train=True, rngs=RNGS)
    with pytest.raises(ValueError, match=r"mixes tokens in training: pass rngs=\{'dropout': key\}"):
        model.apply(_variables(), IMAGES, train=True)


def test_boxes_are_those_of_cutmix():
    boxes = np.asarray(
        jax.jit(jax.vmap(lambda k: mixing.box(k, (4, 6))))(jax.random.split(jax.random.key(0), 4000))
    )
    rows, columns = boxes.any(axis=2), boxes.any(axis=1)
    np.testing.assert_array_equal(boxes, rows[:, :, None] & columns[:, None, :])
    assert rows.sum(axis=1).max() == 2 and columns.sum(axis=1).max() == 4
    # Half a side is floor(floor(4 sqrt(1 - lambda)) / 2), lambda uniform: none where 4 sqrt(1 - lambda) < 2.
    assert (~boxes.any(axis=(1, 2))).mean() == pytest.approx(1 / 4, abs=0.03)


@pytest.mark.parametrize("name", ["lvvit_s", "dynamicvit_lvvit_s"])
def test_official_keys_round_trip(name):
    model, variables = _model(name), _variables(name)
    tensors = weights.export_reference(model, variables)
    assert tensors["patch_embed.conv1.weight"].shape == (4, 3, 7, 7)
    assert tensors["patch_embed.bn3.running_var"].shape == (4,)
    assert tensors["aux_head.weight"].shape == (5, 16)
    assert ("score_predictor.0.in_conv.0.weight" in tensors) == ("dynamicvit" in name)
    loaded = weights.load_weights(model, tensors, strict=True)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@SLOW
def test_dense_weights_start_a_reduced_model():
    tensors, model = weights.export_reference(_model(), _variables()), _model("dtps_lvvit_s", at=(1,))
    _, report = weights.load_weights(model, tensors, head="reset", return_report=True)
    assert not report.unexpected
    assert {path.split("/")[-4 if "reducer_" in path else 0] for path in report.missing} == {
        "reducer_0",
        "head",
        "aux_head",
    }


@pytest.mark.parametrize(
    ("name", "count"), [("lvvit_t", 8_534_720), ("lvvit_m", 55_830_544), ("lvvit_l", 150_021_968)]
)
def test_parameter_counts(name, count):
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(dyntoken.create_model(name).init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


@pytest.mark.parametrize(
    ("name", "keep", "count", "gmacs"),
    [
        ("lvvit_s", None, 26_151_824, 6.551),
        pytest.param("lvvit_m", None, 55_830_544, 12.678, marks=SLOW),
        ("dynamicvit_lvvit_s", 0.7, 26_875_574, 4.650),
        pytest.param("dynamicvit_lvvit_s", 0.5, 26_875_574, 3.790, marks=SLOW),
        pytest.param("dynamicvit_lvvit_m", 0.8, 57_115_030, 9.783, marks=SLOW),
        pytest.param("dynamicvit_lvvit_m", 0.7, 57_115_030, 8.593, marks=SLOW),
        ("dtps_lvvit_s", 0.5, 26_875_574, 3.800),
    ],
)
def test_published_sizes(name, keep, count, gmacs):
    found = macs.count(dyntoken.create_model(name, **({} if keep is None else {"keep": keep})))
    assert found.params == count and found.gmacs == pytest.approx(gmacs, abs=6e-4)


def test_sites_and_crops_are_the_published_ones():
    assert dyntoken.create_model("dtps_lvvit_s").at == (4, 8, 12)
    assert dyntoken.create_model("dynamicvit_lvvit_m").at == (5, 10, 15)
    crops = [dyntoken.preprocess(dyntoken.create_model(f"lvvit_{size}")).crop_pct for size in "tsml"]
    assert crops == [0.9, 0.9, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "lvvit_s",
            {"img_size": 18},
            r"img_size \(18, 18\) is not divisible by patch_size \(4, 4\).*\(16, 16\)",
        ),
        ("lvvit_s", {"patch_size": 1}, "patch_size 1 must be even"),
        ("lvvit_s", {"stem": "resnet"}, "stem is 'resnet': known: conv, patch"),
        ("lvvit_s", {"mix_token": True, "aux_weight": None}, "mix_token=True needs the auxiliary head"),
        ("multiexit_lvvit_s", {"mix_token": True}, "unknown option 'mix_token'"),
        ("dvt_lvvit_s", {}, "cascade needs a backbone whose token grid can be chosen"),
    ],
)
def test_bad_requests_say_what_to_do(name, options, message):
    with pytest.raises(ValueError, match=message):
        model = dyntoken.create_model(name, **{**TINY, **options})
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.input_shape)))


def test_only_models_with_an_auxiliary_head_record_it():
    model = _model(aux_weight=None)
    variables = {"params": {k: v for k, v in _variables()["params"].items() if k != "aux_head"}}
    variables["batch_stats"] = _variables()["batch_stats"]
    jax.eval_shape(model.apply, variables, IMAGES)
    with pytest.raises(ValueError, match="has no auxiliary head to record 'dense' from"):
        model.apply(variables, IMAGES, record=("dense",))
