"""DVT: exits, reuse, `upto`, and what a cascade is refused for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.analysis import macs
from dyntoken.ops import resample
from dyntoken.registry import UnknownNameError

TINY = {"img_size": 32, "width": 16, "depth": 2, "heads": 2, "num_classes": 5, "exits": (2, 3, 4)}
CASES = {
    "deit": ("dvt_deit_tiny", {}),
    "t2t": ("dvt_t2t_vit_7", {"token_dim": 8, "exits": (2, 3)}),
    "two_exits": ("dvt_deit_tiny", {"exits": (2, (3, 4))}),
    "features": ("dvt_deit_tiny", {"relation_reuse": False}),
    "relations": (
        "dvt_deit_tiny",
        {"feature_reuse": False, "class_token": False, "pool": "mean", "exits": (2, 3)},
    ),
    "none": ("dvt_deit_tiny", {"feature_reuse": False, "relation_reuse": False}),
}
IMAGES = np.random.default_rng(7).normal(size=(3, 32, 32, 3)).astype(np.float32)


@functools.cache
def _model(case, **more):
    name, options = CASES[case]
    return dyntoken.create_model(name, **{**TINY, **options, **more})


@functools.cache
def _variables(case):
    return jax.jit(_model(case).init)(jax.random.key(0), IMAGES[:1])


@functools.cache
def _shapes(case):
    return jax.eval_shape(_model(case).init, jax.random.key(0), IMAGES[:1])


def test_reuse_matrix_is_the_official_one():
    for old, new in ((7, 10), (10, 14)):
        matrix = resample.reuse_matrix(old, new)
        expected = np.zeros((4, old))
        expected[0, 0] = expected[3, 2] = 1
        expected[1, :2] = 0.5
        expected[2, 1:3] = 2 / 3, 1 / 3
        np.testing.assert_allclose(matrix[:4], expected)
        np.testing.assert_allclose(matrix.sum(axis=1), 1)


def test_maps_are_resized_on_both_axes_beside_the_class_token():
    old, new = (1, 2), (2, 3)
    a = np.kron(resample.reuse_matrix(1, 2), resample.reuse_matrix(2, 3))
    e = np.zeros((7, 3))
    e[0, 0], e[1:, 1:] = 1, a
    maps = np.arange(18.0, dtype=np.float32).reshape(2, 3, 3)
    found = resample.reuse_maps(jnp.asarray(maps), prefix=1, old=old, new=new)
    np.testing.assert_allclose(found, e @ maps @ e.T, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["deit", "t2t", "two_exits", "relations"])
def test_gradients_reach_all_that_is_used(case):
    model, variables = _model(case), _variables(case)

    def loss(params):
        out = model.apply({"params": params}, IMAGES, train=True)
        return (jax.nn.log_softmax(out.logits) ** 2).sum(), out.logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert logits.shape == (len(model.exits), 3, 5)
    last = f"reuse_{len(model.exits) - 1}/context_1/"
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all(), key
        fixed = "t2t" in case and key.endswith(("/w", "/pos_embed"))
        # After the last block only the class row is read, and its context is zero.
        silent = fixed or key.startswith(last)
        if silent:
            assert float(jnp.abs(leaf).max()) == 0, key
        elif not key.endswith("relation/fc2/bias"):  # a shift of a whole row of logits
            assert float(jnp.abs(leaf).max()) > 0, f"no gradient reaches {key}"


@pytest.mark.thorough
def test_upto_and_steps_equal_the_whole():
    model, variables = _model("deit"), _variables("deit")
    whole = jax.jit(lambda v, x: model.apply(v, x).logits)(variables, IMAGES)
    first = jax.jit(lambda v, x: model.apply(v, x, upto=1).logits)(variables, IMAGES)
    np.testing.assert_allclose(first, whole[:2], atol=1e-6)
    upstream = None
    for index in range(3):
        step = jax.jit(functools.partial(model.apply, index=index, method="step"))
        logits, upstream = step(variables, IMAGES, upstream)
        np.testing.assert_allclose(logits, whole[index], atol=1e-6)
    assert upstream.features is None and upstream.relations is None
    with pytest.raises(ValueError, match="exit 1 takes the result of the exit before"):
        model.apply(variables, IMAGES, index=1, method="step")


def test_early_exits_do_not_know_the_later_ones():
    shapes = [_shapes(case)["params"]["exit_0"] for case in ("deit", "none")]
    assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])
    counted = [macs.count(_model("deit"), upto=index).total for index in range(3)]
    assert counted[0] == macs.count(_model("none"), upto=0).total
    assert counted == sorted(set(counted)) and macs.count(_model("deit")).total == counted[-1]


@pytest.mark.thorough
def test_remat_and_bfloat16():
    model = _model("deit", remat=True, dtype="bfloat16", drop_path=0.2)
    rngs = {"dropout": jax.random.key(1)}
    loss = lambda v: model.apply(v, IMAGES, train=True, rngs=rngs).logits.sum()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(_variables("deit"))
    assert value.dtype == jnp.float32
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_records_have_one_entry_per_exit():
    model = _model("features")
    record = ("features", "blocks", "relations", "context", "maps")
    out = jax.eval_shape(lambda v: model.apply(v, IMAGES, record=record), _shapes("features"))
    assert [t.grid for t in out.tokens] == [(2, 2), (3, 3), (4, 4)]
    assert [len(context) for context in out.records["context"]] == [0, 2, 2]
    assert out.records["context"][2][1].shape == (3, 17, 48) and out.records["maps"] == ((), (), ())
    assert [r[0].shape for r in out.records["relations"]] == [(3, 2, n, n) for n in (5, 10, 17)]


@pytest.mark.thorough
def test_parameters_and_multiply_adds_of_the_paper():
    """blackfeather-wang/Dynamic-Vision-Transformer, both reuses, resizing left out."""
    model = dyntoken.create_model("dvt_t2t_vit_12")
    count = macs.count(model)
    np.testing.assert_allclose(macs.gmacs(model, count), [0.468, 1.446, 3.455], rtol=0.01)
    assert (count.params, count.resize > 0) == (22_461_516, True)


@pytest.mark.parametrize(
    ("name", "expected"), [("dvt_t2t_vit_14", 67_881_836), ("dvt_deit_small", 70_442_232)]
)
def test_parameter_counts(name, expected):
    model = dyntoken.create_model(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def test_names():
    assert dyntoken.list_models("dvt_t2t_vit_1?") == [f"dvt_t2t_vit_{n}" for n in (10, 12, 14, 19)]
    model = dyntoken.create_model("dvt_vit_mini")
    assert (model.input_shape, model.num_classes, model.grids) == (
        (28, 28, 1),
        10,
        ((7, 7), (10, 10), (14, 14)),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": (4, 4)}, "each exit needs a finer token grid than the one before"),
        ({"exits": ((4, 2), (3, 4))}, "each exit needs a finer token grid"),
        ({"exits": ()}, "exits is empty"),
        ({"exits": (2, 40)}, r"an image of \(32, 32\) pixels does not give \(40, 40\) patches"),
        ({"distilled": True}, "without distilled=True"),
        ({"heads": 3}, "width 16 is not divisible by 3 heads"),
        ({"context_width": 0}, "must be at least 1"),
        ({"patch_size": 8}, "unknown option 'patch_size'"),
        ({"keep": 0.7}, "takes no .keep.: put a method into its name, as in dvt_dtps_deit_tiny"),
        ({"context": 3}, "unknown option 'context'"),
    ],
)
def test_bad_requests_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        dyntoken.create_model("dvt_deit_tiny", **{**TINY, **options})


def test_bad_calls_say_what_to_do():
    model, variables = _model("none"), _variables("none")
    with pytest.raises(ValueError, match="upto=3: this model has the exits 0 to 2"):
        model.apply(variables, IMAGES, upto=3)
    with pytest.raises(UnknownNameError, match=r"unknown record 'relation'.*relations"):
        model.apply(variables, IMAGES, record=("relation",))


def test_a_convolutional_stem_gives_every_grid():
    """CCT's stem in a cascade: its patches are powers of 2, the image is padded to fit."""
    model = dyntoken.create_model(
        "dvt_vit_mini", exits=(2, 4, 7), stem="conv", depth=1, width=16, img_size=26
    )
    images = np.ones((1, 26, 26, 1), np.float32)
    out = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, record=("features",)))[0]
    assert [tokens.grid for tokens in out.tokens] == [(2, 2), (4, 4), (7, 7)]
    assert [model.plain(i).patches for i in range(3)] == [
        ((16, 16), (3, 3)),
        ((8, 8), (3, 3)),
        ((4, 4), (1, 1)),
    ]
    with pytest.raises(ValueError, match=r"stem='conv' needs square patches of 2, 4, 8"):
        dyntoken.create_model("dvt_vit_mini", exits=(4, (4, 8)), stem="conv")
