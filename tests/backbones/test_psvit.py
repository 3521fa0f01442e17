"""PS-ViT: points, their order and their moves, both poolings, official names, published sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import weights
from dyntoken.analysis import macs
from dyntoken.backbones import psvit
from dyntoken.weights import with_buffers

TINY = {
    "img_size": 16,
    "width": 16,
    "depth": 1,
    "iterations": 2,
    "heads": 2,
    "stem_channels": (4, 4, 8, 4),
    "num_classes": 5,
}
IMAGES = np.random.default_rng(7).normal(size=(2, 16, 16, 3)).astype(np.float32)


def _model(**options):
    return dyntoken.create_model("psvit_b_3", **{**TINY, **options})


@functools.cache
def _variables():
    return jax.jit(_model().init)(jax.random.key(0), IMAGES[:1])


def test_points_are_cell_centres_row_by_row():
    points = psvit.start_points((2, 3), (4, 12))
    np.testing.assert_allclose(points, [[1, 2], [1, 6], [1, 10], [3, 2], [3, 6], [3, 10]])


@pytest.mark.thorough
def test_points_move_by_the_whole_offset_and_sampling_by_gamma_of_it():
    variables = jax.tree.map(jnp.copy, _variables())
    assert float(jnp.abs(variables["params"]["backbone"]["sampling_0"]["offset_layer"]["kernel"]).max()) == 0
    variables["params"]["backbone"]["sampling_0"]["offset_layer"]["bias"] = jnp.asarray([0.25, -0.5])

    @functools.partial(jax.jit, static_argnums=0)
    def run(gamma, variables):
        out, seen = _model(gamma=gamma).apply(variables, IMAGES, mutable=["intermediates"])
        return out.logits, seen["intermediates"]["backbone"]["points"]

    none, points = run(0.0, variables)
    start = np.broadcast_to(psvit.start_points((3, 3), (4, 4)), (2, 9, 2))
    np.testing.assert_allclose(points[0], start)
    np.testing.assert_allclose(points[1], start + np.array([0.25, -0.5]))
    assert np.abs(run(1.0, variables)[0] - none).max() > 1e-4


def test_without_class_token_the_mean_is_classified():
    model = _model(class_token=False, pool="mean")
    params = {**_variables()["params"]}
    params["backbone"] = {k: v for k, v in params["backbone"].items() if k != "cls_token"}
    out = jax.jit(lambda v: model.apply(v, IMAGES, record=("features",)))({**_variables(), "params": params})
    head = jax.tree.map(np.asarray, params["head"]["cls"])
    assert out.tokens.prefix == 0 and out.tokens.x.shape == (2, 9, 16)
    expected = np.asarray(out.tokens.x).mean(axis=1) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(out.logits, expected, atol=1e-5)


def test_remat_and_half_precision_build():
    model = _model(remat=True, drop_path=0.2, dtype="bfloat16")

    def loss(variables):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, IMAGES, train=True, rngs=rngs, mutable=["batch_stats"])[0].logits.sum()

    grads = jax.eval_shape(jax.grad(loss), _variables())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))


def test_stochastic_depth_grows_over_sampling_and_trunk():
    model = dyntoken.create_model("psvit_b_14", drop_path=0.13)
    body = model.plain()
    sampling = [body._sampling_block(i)["drop_path"] for i in range(4)]
    trunk = [dict(body._block(i).options)["drop_path"] for i in range(10)]
    np.testing.assert_allclose(sampling + trunk, np.linspace(0, 0.13, 14))


def test_official_keys_round_trip():
    tensors = weights.export_reference(_model(), _variables())
    assert tensors["stem.4.downsample.0.weight"].shape == (8, 4, 1, 1)
    assert tensors["ps_layers.0.offset_layer.weight"].shape == (2, 16)
    assert tensors["trans_layers.0.attn.qkv.weight"].shape == (48, 16)
    parameters = len(tensors)
    tensors = with_buffers(_model(), tensors)
    # The shared layer once more per step, the points column by column, and a counter per BatchNorm.
    assert len(tensors) == parameters + 2 * 2 + 1 + sum(key.endswith("running_var") for key in tensors)
    np.testing.assert_allclose(tensors["point_coord"][0, :2], [[2 / 3, 2 / 3], [2, 2 / 3]], rtol=1e-6)
    assert tensors["stem.1.num_batches_tracked"].dtype == np.int64
    loaded = weights.load_weights(_model(), tensors, strict=True)
    jax.tree.map(np.testing.assert_array_equal, loaded, _variables())
    tensors["ps_layers.1.position_layer.bias"] = tensors["pos_layer.bias"] + 1
    with pytest.raises(weights.WeightsError, match=r"ps_layers\.1\.position_layer\.bias"):
        weights.load_weights(_model(), tensors, strict=True)


@pytest.mark.parametrize(
    ("name", "count", "gmacs"),
    [
        ("psvit_ti_14", 4_777_902, 1.565),
        pytest.param("psvit_b_10", 21_344_302, 3.091, marks=pytest.mark.slow),
        ("psvit_b_14", 21_344_302, 5.380),
        pytest.param("psvit_b_18", 21_344_302, 8.741, marks=pytest.mark.slow),
    ],
)
def test_published_sizes(name, count, gmacs):
    found = macs.count(dyntoken.create_model(name))
    assert found.params == count and found.gmacs == pytest.approx(gmacs, abs=6e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 18}, r"img_size \(18, 18\) is not divisible by 4; the nearest that fits is \(16, 16\)"),
        ({"iterations": 0}, "iterations is 0: give a whole number of at least 1"),
        ({"stem_channels": (4, 4)}, "stem_channels is .4, 4.: give 4 values"),
        ({"class_token": False}, "pool='token' needs a class token"),
    ],
)
def test_bad_requests_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        model = _model(**options)
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.input_shape)))
