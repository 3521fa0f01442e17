"""PVT: published sizes, official names, positions of every stage on other grids, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import weights
from dyntoken.analysis import macs
from dyntoken.ops import resample

SLOW = pytest.mark.slow
TINY = {"img_size": 16, "patch_size": 2, "widths": (8, 16), "depths": (1, 2), "heads": (1, 2)}
TINY |= {"mlp_ratios": (2, 2), "sr_ratios": (2, 1), "num_classes": 5}


def _model(name="pvt_tiny", **options):
    return dyntoken.create_model(name, **{**TINY, **options})


def _variables(model):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *model.input_shape))))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


@pytest.mark.parametrize(
    ("name", "count", "gmacs"),
    [
        ("pvt_tiny", 13_229_288, 1.933),
        pytest.param("pvt_small", 24_485_864, 3.816, marks=SLOW),
        pytest.param("pvt_medium", 44_208_104, 6.659, marks=SLOW),
        pytest.param("pvt_large", 61_369_320, 9.814, marks=SLOW),
    ],
)
def test_published_sizes(name, count, gmacs):
    found = macs.count(dyntoken.create_model(name))
    assert found.params == count and found.gmacs == pytest.approx(gmacs, abs=6e-4)


@pytest.mark.slow
def test_what_maps_cost_does_not_shrink():
    """Keys of a stage come from its whole map, and the next stage's embedding does, too."""
    dense, reduced = (macs.count(dyntoken.create_model(n)) for n in ("pvt_tiny", "dynamicvit_pvt_tiny"))
    assert reduced.conv == dense.conv
    for number, kept in enumerate((2195, 548, 137, 34)):
        tokens = kept + (number == 3)
        assert reduced.by_block[2 * number].tokens_out == tokens
        module = f"backbone/stage_{number}/trunk/blocks_0/attn"
        whole, less = (c.under(f"{module}/kv").dot for c in (dense, reduced))
        assert (less == whole) == (number < 3)
    assert reduced.gmacs == pytest.approx(1.511, abs=6e-4)


def test_official_keys_round_trip():
    model = _model()
    variables = _variables(model)
    tensors = weights.export_reference(model, variables)
    shapes = {key: tensors[key].shape for key in ("pos_embed2", "block1.0.attn.sr.weight", "cls_token")}
    assert shapes == {
        "pos_embed2": (1, 17, 16),
        "block1.0.attn.sr.weight": (8, 8, 2, 2),
        "cls_token": (1, 1, 16),
    }
    assert {"patch_embed1.norm.bias", "block2.1.attn.kv.weight", "norm.weight", "head.bias"} < set(tensors)
    loaded = weights.load_weights(model, tensors, strict=True)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_positions_of_every_stage_are_resized_as_official():
    tensors = weights.export_reference(_model(), _variables(_model()))
    params = weights.load_weights(_model(img_size=(24, 32)), tensors, strict=True)["params"]["backbone"]
    first = resample.resize_grid(jnp.asarray(tensors["pos_embed1"]), (8, 8), (12, 16), "bilinear")
    np.testing.assert_allclose(params["stage_0"]["pos_embed"], first, atol=1e-6)
    patches = jnp.asarray(tensors["pos_embed2"][:, 1:])
    second = resample.resize_grid(patches, (4, 4), (6, 8), "bilinear")
    np.testing.assert_allclose(params["stage_1"]["pos_embed"][:, 1:], second, atol=1e-6)
    np.testing.assert_array_equal(params["stage_1"]["pos_embed"][:, :1], tensors["pos_embed2"][:, :1])


def test_our_own_file_knows_its_grids(tmp_path):
    wide = _model(img_size=(8, 32))  # as many patches as 16 x 16
    variables = _variables(wide)
    weights.save_weights(tmp_path / "wide.safetensors", variables, model=wide)
    params = weights.load_weights(_model(), tmp_path / "wide.safetensors")["params"]["backbone"]
    for number, old in enumerate(((4, 16), (2, 8))):
        table = variables["params"]["backbone"][f"stage_{number}"]["pos_embed"][:, number:]
        new = (old[0] * 2, old[1] // 2)
        np.testing.assert_allclose(
            params[f"stage_{number}"]["pos_embed"][:, number:],
            resample.resize_grid(table, old, new, "bilinear"),
            atol=1e-6,
        )


def test_stochastic_depth_grows_over_all_blocks():
    body = dyntoken.create_model("pvt_tiny", drop_path=0.7).plain()
    rates = [body.path_rate(stage, index) for stage in range(4) for index in range(2)]
    np.testing.assert_allclose(rates, np.linspace(0, 0.7, 8))
    body = dyntoken.create_model("pvt_tiny", drop_path=(0, 0, 0.2, 0.3), drop_path_rule="constant").plain()
    assert [body.path_rate(stage, 0) for stage in range(4)] == [0, 0, 0.2, 0.3]


def test_sites_by_default_and_by_request():
    assert dyntoken.create_model("dtps_pvt_small").at == (0, 1, 2, 3)
    assert dyntoken.create_model("etps_pvt_small").at == (3,)
    model = dyntoken.create_model("dtps_pvt_small", keep=0.5, at=(1, 2))
    counts = [dict(site.reducer.options) for site in model.sites()]
    assert [(c["current"], c["keep"], c["ratio"]) for c in counts] == [(784, 392, 0.5), (196, 98, 0.5)]
    model = dyntoken.create_model("dtps_pvt_small", keep=(0.9, 0.8, 0.7, 0.6))
    assert [site.reducer["keep"] for site in model.sites()] == [2822, 627, 137, 29]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "pvt_tiny",
            {"img_size": (18, 16)},
            r"\(18, 16\) is not divisible by 4 .*nearest that fits is \(16, 16\)",
        ),
        ("pvt_tiny", {"sr_ratios": (2, 2)}, "the last stage has a class token"),
        ("pvt_tiny", {"sr_ratios": (16, 1)}, r"stage 0 has a map of \(8, 8\)"),
        ("pvt_tiny", {"heads": (1,)}, r"heads=\(1,\) has 1 entries for 2 stages"),
        ("pvt_tiny", {"heads": (1, 3)}, "width 16 is not divisible by 3 heads"),
        ("pvt_tiny", {"dropped": "last"}, "is dense and takes no 'dropped'"),
        ("dtps_pvt_tiny", {"dropped": "mean"}, "dropped is 'mean': known: last, zero"),
        ("dtps_pvt_tiny", {"at": (2,)}, r"at=\(2,\) must be increasing stage indices between 0 and 1"),
        ("etps_pvt_tiny", {"at": (0,)}, "class token, and that joins at stage 1 .*; dynamicvit, dtps.* work"),
        ("dtps_pvt_tiny", {"fuse": "one_token"}, r"no cell on a map, and only stage 1 \(at=\(1,\)\) needs"),
        ("dvt_pvt_tiny", {}, "a cascade needs a backbone whose token grid can be chosen"),
        ("multiexit_pvt_tiny", {}, "pvt_tiny has stages"),
    ],
)
def test_bad_requests_say_what_to_do(name, options, message):
    with pytest.raises(ValueError, match=message):
        _model(name, **options)


def test_weights_of_another_backbone_are_refused():
    tensors = weights.export_reference(_model(), _variables(_model()))
    with pytest.raises(weights.WeightsError, match="weights of another model"):
        weights.load_weights(
            dyntoken.create_model("deit_tiny_patch16_224", depth=1, width=16, heads=2), tensors
        )
