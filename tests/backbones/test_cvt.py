"""CvT: published sizes, odd maps, official names, class attention on strided keys, BatchNorm in training."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import device_augment, losses, optim, weights
from dyntoken.analysis import macs
from dyntoken.backbones.cvt import key_weights
from dyntoken.nn.layers import ACTIVATIONS
from dyntoken.train import sharding as meshes
from dyntoken.train.state import create_state
from dyntoken.train.step import train_step
from dyntoken.weights import official

SLOW = pytest.mark.slow
TINY = {"widths": (8, 16), "depths": (1, 1), "heads": (1, 2), "mlp_ratios": (2, 2), "num_classes": 5}
TINY |= {"img_size": 16, "patch_sizes": (3, 3), "patch_strides": (2, 2), "patch_paddings": (1, 1)}
TINY |= {"kernels": (3, 3), "kv_strides": (2, 2), "kv_paddings": (1, 1), "class_tokens": (False, True)}


def _model(name="cvt_13", **options):
    return dyntoken.create_model(name, **{**TINY, **options})


@functools.cache
def _variables(name="cvt_13"):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: _model(name).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3))))
    tree = jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.15, s.shape), s.dtype), shapes)
    return {**tree, "batch_stats": jax.tree.map(jnp.abs, tree["batch_stats"])}


@pytest.mark.parametrize(
    ("name", "count", "gmacs"),
    [
        ("cvt_13", 19_997_480, 4.566),
        pytest.param("cvt_21", 31_622_696, 7.178, marks=SLOW),
        pytest.param("cvt_w24", 277_196_392, 194.222, marks=SLOW),
        pytest.param("cvt_13_384", 19_997_480, 16.269, marks=SLOW),
    ],
)
def test_published_sizes(name, count, gmacs):
    found = macs.count(dyntoken.create_model(name))
    assert found.params == count and found.gmacs == pytest.approx(gmacs, abs=6e-4)


def test_any_size_will_do_and_odd_maps_round_up():
    body = dyntoken.create_model("cvt_13", img_size=(97, 55)).plain()
    assert body.grids == ((24, 14), (12, 7), (6, 4))
    with pytest.raises(ValueError, match=r"img_size \(2, 2\) is too small"):
        dyntoken.create_model("cvt_13", img_size=2)


def test_a_patch_between_two_keys_gets_their_mean():
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1], [0, 0, 1]]
    np.testing.assert_allclose(key_weights(6, 3, 2, 1), expected)
    np.testing.assert_allclose(key_weights(4, 3, 1, 1), np.eye(4))


def test_quick_gelu():
    np.testing.assert_allclose(
        ACTIVATIONS["quick_gelu"](jnp.asarray([-1.0, 0.0, 2.0])), [-0.154204, 0, 1.935659], atol=1e-6
    )


def test_official_keys_round_trip():
    tensors = weights.export_reference(_model(), _variables())
    attention = "stage1.blocks.0.attn.conv_proj_k"
    shapes = {key: tensors[key].shape for key in (f"{attention}.conv.weight", f"{attention}.bn.running_var")}
    assert list(shapes.values()) == [(16, 1, 3, 3), (16,)]
    assert {"stage1.cls_token", "stage0.patch_embed.proj.weight", "norm.bias", "head.weight"} < set(tensors)
    tensors[f"{attention}.bn.num_batches_tracked"] = np.zeros((), int)
    loaded = weights.load_weights(_model(), tensors, strict=True)
    jax.tree.map(np.testing.assert_array_equal, loaded, _variables())


def _spec(**changes):
    lists = {"PATCH_SIZE": 3, "PATCH_STRIDE": 2, "PATCH_PADDING": 1, "DIM_EMBED": 8, "NUM_HEADS": 1}
    lists |= {"DEPTH": 1, "MLP_RATIO": 2.0, "DROP_RATE": 0.0, "DROP_PATH_RATE": 0.0, "ATTN_DROP_RATE": 0.0}
    lists |= {"QKV_BIAS": True, "CLS_TOKEN": False, "QKV_PROJ_METHOD": "dw_bn", "KERNEL_QKV": 3}
    lists |= {"PADDING_KV": 1, "STRIDE_KV": 2, "PADDING_Q": 1, "STRIDE_Q": 1}
    return {"NUM_STAGES": 2, **{k: [v, v] for k, v in lists.items()}, **changes}


def test_import_reads_the_official_spec():
    options = {"num_classes": 5, "img_size": 16, "spec": _spec(QKV_BIAS=[False, True])}
    model = official.build("microsoft/CvT", "ConvolutionalVisionTransformer", options).model
    assert model.pool == "mean" and model.plain().qkv_bias == (False, True)
    for changes, message in (
        ({"QKV_PROJ_METHOD": ["dw_bn", "max"]}, "projection"),
        ({"PADDING_Q": [1, 0]}, "changes the size of the queries' map"),
        ({"STRIDE_QK": [1, 1]}, "no entry 'STRIDE_QK'.*STRIDE_KV"),
    ):
        with pytest.raises(weights.WeightsError, match=message):
            official.build(
                "microsoft/CvT", "ConvolutionalVisionTransformer", {**options, "spec": _spec(**changes)}
            )


def test_what_is_refused():
    pairs = dyntoken.models.pairings("cvt_13")
    assert [name for name, reason in pairs.items() if not reason][:4] == [
        "dynamicvit",
        "dtps",
        "topk",
        "etps",
    ]
    with pytest.raises(ValueError, match=r"every stage needs one; dynamicvit, dtps, topk, etps.* work there"):
        _model("evit_cvt_13")
    with pytest.raises(ValueError, match=r"class token, and that joins at stage 1 \(at=\(1,\)\)"):
        _model("etps_cvt_13", at=(0, 1))
    with pytest.raises(ValueError, match="class token, and there is none"):
        _model("etps_cvt_13", class_tokens=(False, False), pool="mean")
    both = _model("etps_cvt_13", class_tokens=(True, True))
    assert both.at == (0, 1) and _model("etps_cvt_13").at == (1,)


def test_stochastic_depth_is_that_of_the_last_stage():
    body = dyntoken.create_model("cvt_13", drop_path=0.09).plain()
    rates = [body.path_rate(stage, index) for stage in range(3) for index in range(body.depths[stage])]
    np.testing.assert_allclose(rates, [0, 0, 0, *np.linspace(0, 0.09, 10)])


@functools.cache
def _trained(devices, name="dtps_cvt_13", **options):
    """(state, metrics) after two steps on the first devices."""
    model = _model(name, keep=0.6, drop_path=0.2, **options)

    def augment(key, images, labels, ids):
        images = device_augment.normalize(images, (0.5,) * 3, (0.25,) * 3)
        return device_augment.mix(key, images, labels, num_classes=5, mixup=0.8, cutmix=1.0)

    variables = jax.tree.map(jnp.copy, _variables(name))
    tx, _ = optim.make(
        variables["params"], total_steps=10, steps_per_epoch=5, name="sgd", lr=0.1, weight_decay=0.0, clip=1.0
    )
    options = {
        "objective": losses.Objective({"ce": {}, "keep_ratio": {}}),
        "augment": augment,
        "seed": 3,
        "ema": 0.9,
    }
    step = functools.partial(train_step, model=model, tx=tx, **options)
    mesh = meshes.data_mesh(jax.devices()[:devices])
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
        "label": rng.integers(0, 5, 8).astype(np.int32),
        "mask": np.ones(8, np.float32),
        "id": np.arange(8, dtype=np.int32),
    }
    state = meshes.replicate(create_state(variables, tx, ema=True), mesh)
    run = meshes.data_parallel(step, mesh, replicated=2, donate=(0,))
    for _ in range(2):
        state, _ = run(state, meshes.replicate({}, mesh), meshes.place(batch, mesh))
    return jax.device_get(state)


@pytest.mark.slow
def test_four_devices_and_recomputing_do_what_one_does():
    """Parameters, running statistics and their averages."""
    one, four, again = _trained(1), _trained(4), _trained(1, remat=True)
    for other in (four, again):
        chex.assert_trees_all_close(one.params, other.params, atol=2e-5)
        chex.assert_trees_all_close(one.extra, other.extra, atol=2e-5)
        chex.assert_trees_all_close(one.ema, other.ema, atol=2e-5)
    start = _variables("dtps_cvt_13")["batch_stats"]
    for a, b, c in zip(*map(jax.tree.leaves, (one.extra, start, one.ema["batch_stats"])), strict=True):
        assert np.abs(a - b).max() > 1e-3 and np.abs(a - c).max() > 1e-4
