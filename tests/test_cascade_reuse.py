"""DVT: each ablation of the reuse does what it says and trains; maps in pieces are the same maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.analysis import macs
from dyntoken.cascade.reuse import ContextMlp, RelationMlp, Reuse
from dyntoken.ops import resample

TINY = {"img_size": 12, "width": 8, "depth": 2, "heads": 2, "num_classes": 3, "exits": (2, 3)}
IMAGES = np.random.default_rng(7).normal(size=(2, 12, 12, 3)).astype(np.float32)
RECORD = ("blocks", "relations", "context", "maps", "biases")
ABLATIONS = {  # together they hold every switch; alone each is trained in the slow suite
    "layer": {
        "feature_source": "layer",
        "feature_class_token": True,
        "feature_norm": False,
        "relation_source": "layer",
    },
    "first": {
        "feature_layers": "first",
        "relation_source": "last",
        "relation_mixer": "linear",
        "relation_resize": "flat",
    },
    **{
        f"{name}={value}": {name: value}
        for options in (
            {"feature_source": "layer", "feature_class_token": True, "feature_norm": False},
            {"feature_layers": "first", "relation_source": "layer", "relation_mixer": "linear"},
            {"relation_source": "last", "relation_resize": "flat"},
        )
        for name, value in options.items()
    },
}
CASES = [pytest.param(c, marks=pytest.mark.slow if "=" in c else ()) for c in ABLATIONS]


def _random(shapes):
    """Random weights of some size: right after initialisation everything is almost zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.2, s.shape), s.dtype), shapes)


@functools.cache
def _trained(case):
    """(model, variables, output with records, gradients, parameters after two steps, losses)."""
    model = dyntoken.create_model("dvt_deit_tiny", **TINY, **ABLATIONS[case])
    params = _random(jax.eval_shape(model.init, jax.random.key(0), IMAGES[:1]))["params"]

    @jax.jit
    def step(params):
        def loss(params):
            out = model.apply({"params": params}, IMAGES, train=True, record=RECORD)
            return (jax.nn.log_softmax(out.logits) ** 2).mean(), out

        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), value, out, grads

    once, before, out, grads = step(params)
    twice, after, *_ = step(once)
    return model, params, out, grads, twice, (float(before), float(after))


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_ablation_trains(case):
    model, _, _, grads, twice, (before, after) = _trained(case)
    assert after < before
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all(), key
        # After the last block only the class row is read; a shift of a row of logits changes nothing.
        silent = key.startswith("reuse_1/context_1/") and not model.feature_class_token
        shift = key.startswith("reuse_1/relation") and key.endswith(("fc2/bias", "fc/bias"))
        if silent:
            assert float(jnp.abs(leaf).max()) == 0, key
        elif not shift:
            assert float(jnp.abs(leaf).max()) > 0, f"no gradient reaches {key}"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(twice))


def _embedded(params, layer, features, **options):
    """A context embedding of `features [B, n, C]`, by the module alone."""
    return ContextMlp(128, 48, 1e-6, **options).apply({"params": params[f"context_{layer}"]}, features)


def test_layer_wise_sources_class_token_and_no_norm():
    _, params, out, *_ = _trained("layer")
    reuse, records = params["reuse_1"], out.records
    assert set(reuse["context_0"]) == {"fc1", "fc2"}
    for layer in range(2):
        expected = _embedded(reuse, layer, records["blocks"][0][layer], normalise=False)
        found = records["context"][1][layer]
        np.testing.assert_allclose(found[:, :1], expected[:, :1], atol=1e-5)
        cells = resample.reuse_axis(expected[:, 1:], 1, (2, 2), (3, 3))
        np.testing.assert_allclose(found[:, 1:], cells, atol=1e-5)
        mixer = {"params": reuse[f"relation_{layer}"]}
        mixed = RelationMlp().apply(mixer, records["relations"][0][layer])
        np.testing.assert_allclose(records["maps"][1][layer], mixed, atol=1e-5)
    assert reuse["relation_0"]["fc1"]["kernel"].shape == (2, 6) and "relation" not in reuse


def test_first_layer_only():
    _, params, out, *_ = _trained("first")
    records = out.records
    assert records["context"][1][1] is None and "context_1" not in params["reuse_1"]
    blocks = params["exit_1"]["backbone"]["trunk"]
    widths = [blocks[f"blocks_{layer}"]["norm2"]["scale"].shape[0] for layer in range(2)]
    assert widths == [8 + 48, 8]  # no block but the first has further channels at all
    expected = _embedded(params["reuse_1"], 0, records["blocks"][0][-1][:, 1:])
    cells = resample.reuse_axis(expected, 1, (2, 2), (3, 3))
    np.testing.assert_allclose(records["context"][1][0][:, 1:], cells, atol=1e-5)
    assert (records["context"][1][0][:, 0] == 0).all()


def test_relations_of_the_last_layer_by_a_linear_layer_and_naive_resizing():
    _, params, out, *_ = _trained("first")
    maps, last = out.records["maps"][1], np.asarray(out.records["relations"][0][-1])
    for layer in range(2):
        mixer = params["reuse_1"][f"relation_{layer}"]["fc"]
        mixed = np.einsum("bcqk,cd->bdqk", last, mixer["kernel"]) + np.asarray(mixer["bias"])[:, None, None]
        np.testing.assert_allclose(maps[layer], mixed, atol=1e-5)
    flat = np.zeros((10, 5))
    flat[0, 0] = 1
    # 4 cells by the factor 3, then 9 cells of them: by hand, without a grid.
    flat[1:4, 1:3] = [[1, 0], [1, 0], [0.5, 0.5]]
    flat[4:7, 1:5] = [[0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 1, 0]]
    flat[7:, 3:] = [[0.5, 0.5], [0, 1], [0, 1]]
    found = np.asarray(out.records["biases"][1][0])
    np.testing.assert_allclose(found, flat @ np.asarray(maps[0]) @ flat.T, atol=1e-5)


def _reuse(**options):
    fields = {"old": (3, 3), "new": (4, 4), "heads": 2, "prefix": 1, "norm_eps": 1e-6, "context": (0, 0)}
    fields |= {
        "context_hidden": 8,
        "feature_class_token": False,
        "feature_norm": True,
        "relation_reuse": True,
    }
    fields |= {"relation_source": "all", "relation_mixer": "mlp", "relation_resize": "grid"}
    return Reuse(**{**fields, "relation_chunks": 1, **options})


@pytest.mark.parametrize(
    ("source", "remat", "chunks"),
    [
        ("all", True, 3),  # with a row left over
        pytest.param("layer", False, 3, marks=pytest.mark.slow),
        pytest.param("all", False, 99, marks=pytest.mark.slow),  # more pieces than rows
    ],
)
def test_maps_in_pieces_are_the_same_maps(source, remat, chunks):
    relations = [jax.random.normal(jax.random.key(i), (2, 2, 10, 10)) for i in range(2)]

    def run(chunks):
        module = _reuse(relation_source=source, remat=remat, relation_chunks=chunks)
        apply = lambda v, r: jnp.concatenate(module.apply(v, r, [None] * 2, method="maps"))  # noqa: E731
        shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), relations, [None] * 2, method="maps"))

        def both(v, r):
            maps, pull = jax.vjp(apply, v, r)
            return maps, pull(jnp.cos(maps))

        return jax.jit(both)(_random(shapes), relations)

    whole = run(1)
    assert whole[0].shape == (4, 2, 10, 10)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(run(chunks)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_pieces_take_less_memory_and_as_many_multiply_adds():
    relations = [jax.ShapeDtypeStruct((4, 4, 65, 65), jnp.float32)] * 4

    def temporary(chunks):
        module = _reuse(old=(8, 8), heads=4, context=(0,) * 4, relation_chunks=chunks, remat=True)
        maps = lambda v, r: module.apply(v, r, [None] * 4, method="maps")  # noqa: E731
        shapes = jax.eval_shape(
            lambda r: module.init(jax.random.key(0), r, [None] * 4, method="maps"), relations
        )
        loss = lambda v, r: sum((m**2).sum() for m in maps(v, r))  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(shapes, relations).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(13) < 0.6 * temporary(1)
    counts = [
        macs.count(dyntoken.create_model("dvt_deit_tiny", **TINY, relation_chunks=chunks))
        for chunks in (1, 2)
    ]
    assert counts[0].total == counts[1].total and counts[0].by_module == counts[1].by_module


@pytest.mark.parametrize("exits", [(4, 7, 14), (7, 14), (7, 10), ((3, 4), (6, 4), (6, 9))])
@pytest.mark.parametrize("name", ["dvt_deit_tiny", "dvt_t2t_vit_7"])
def test_grids_and_image_sizes(name, exits):
    model = dyntoken.create_model(name, exits=list(exits), width=16, depth=1, heads=2, num_classes=5)
    images = jnp.zeros((1, 224, 224, 3))
    out = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), images, record=("relations", "features"))[0]
    )
    cells = [rows * columns for rows, columns in model.grids]
    assert out.logits.shape == (len(exits), 1, 5)
    assert [r[0].shape[-1] for r in out.records["relations"]] == [n + 1 for n in cells]
    assert [t.grid for t in out.tokens] == list(model.grids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": 14}, r"does not give \(14, 14\) patches"),  # one number is one exit
        ({"exits": 14.5}, "exits is 14.5: give a sequence"),
        ({"exits": ("7-10",)}, "exits is .*: give a sequence"),
        ({"depth": (2, 3)}, "depth=.2, 3.: the exits of a cascade share one backbone"),
        ({"heads": (1, 2)}, "heads=.1, 2.: the exits of a cascade share one backbone"),
        ({"feature_source": "first"}, "feature_source is 'first': known: last, layer"),
        ({"relation_source": "first"}, "relation_source is 'first': known: all, last, layer"),
        ({"relation_resize": "naive"}, "relation_resize is 'naive': known: flat, grid"),
        ({"relation_chunks": 0}, "relation_chunks is 0: give a whole number of at least 1"),
        ({"feature_reuse": False, "feature_norm": False}, "feature_norm says how feature_reuse works"),
        ({"relation_reuse": False, "relation_chunks": 2}, "relation_chunks says how relation_reuse works"),
        (
            {"class_token": False, "pool": "mean", "feature_class_token": True},
            "needs a backbone with a class",
        ),
    ],
)
def test_bad_requests_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        dyntoken.create_model("dvt_deit_tiny", **{**TINY, **options})
