"""`method="features"` of every family of backbones, and `unreduce` against loops."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.backbones.isotropic import Isotropic
from dyntoken.backbones.staged_dual_path import DualPathStages
from dyntoken.backbones.staged_regrown import RegrownStages
from dyntoken.types import Tokens
from tests.backbones import small

TINY = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 5}
IMAGES = np.random.default_rng(3).normal(size=(2, 16, 16, 3)).astype(np.float32)


@functools.cache
def _model(name, **more):
    return dyntoken.create_model(name, **{**TINY, **more})


@functools.cache
def _variables(name, **more):
    """Random weights of some size: right after initialisation the scores nearly tie."""
    rng, model = np.random.default_rng(0), _model(name, **more)
    images = jnp.zeros((1, *model.input_shape))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.2, s.shape), s.dtype), shapes)


def _run(name, *, images=IMAGES, changed=None, build=None, **asked):
    """(features, the output of a call) of one program."""
    build = build or {}
    model = _model(name, **build).clone(**(changed or {}))

    @jax.jit
    def both(variables):
        return (
            model.apply(variables, images, method="features", **asked),
            model.apply(variables, images, record=("features",)),
        )

    return both(_variables(name, **build))


@pytest.mark.parametrize("form", ["gather", "mask"])
def test_of_a_reduced_model(form):
    name = "evit_deit_tiny_patch16_224"
    build = (("at", (1,)), ("keep", 0.5))
    features, out = _run(name, build=dict(build), changed={"form": form}, blocks=(-1, 0, 1))
    assert features.numbers == (2, 0, 1) and features.pooled.shape == (2, 16)
    head = _variables(name, **dict(build))["params"]["head"]["cls"]
    np.testing.assert_allclose(features.pooled @ head["kernel"] + head["bias"][None], out.logits, atol=1e-5)
    np.testing.assert_array_equal(features.pooled, features.tokens.x[:, 0])
    np.testing.assert_allclose(features.tokens.x, out.tokens.x, atol=1e-6)
    np.testing.assert_array_equal(features.tokens.place, out.tokens.place)
    last, first, middle = features.blocks
    assert first.count == 16 and first.prefix == 1 and middle.count == last.count
    assert middle.count == (17 if form == "mask" else 9)  # one row of them is fused
    np.testing.assert_array_equal(middle.carrier, out.reductions[0].carrier)
    assert features.block(-2) is middle
    for block, tokens in ((None, features.tokens), (1, middle), (-3, first)):
        for fill in ("host", "zero", "bilinear"):
            dense = np.asarray(dyntoken.unreduce(features, fill, block=block)).reshape(2, 16, 16)
            kept = np.asarray(tokens.carrier) >= 0
            if fill == "host":
                assert kept.all()  # the fused row carries what is not kept
                rows = np.take_along_axis(
                    np.asarray(tokens.patches), np.asarray(tokens.carrier)[..., None], axis=1
                )
                np.testing.assert_array_equal(dense, rows)
    np.testing.assert_array_equal(dyntoken.unreduce(first), first.patches.reshape(2, 4, 4, 16))
    with pytest.raises(ValueError, match=r"block 3 was not recorded: ask for it, as in blocks=\(3,\)"):
        dyntoken.unreduce(features, block=3)


def test_the_fills_of_both_forms_agree():
    build = {"at": (1,), "keep": 0.5}
    gather, mask = (
        _run("dtps_deit_tiny_patch16_224", build=build, changed={"form": f})[0] for f in ("gather", "mask")
    )
    for fill in ("host", "zero", "bilinear"):
        np.testing.assert_allclose(
            dyntoken.unreduce(gather, fill), dyntoken.unreduce(mask, fill), atol=2e-4, err_msg=fill
        )


def test_a_normed_last_block_is_what_the_head_reads_and_loops_change_nothing():
    name, asked = "deit_tiny_patch16_224", {"blocks": (0, 2), "norm": True}
    features, out = _run(name, **asked)
    np.testing.assert_allclose(features.blocks[1].x, out.tokens.x, atol=1e-6)
    looped, _ = _run(name, build={"scan": True}, **asked)
    np.testing.assert_allclose(looped.blocks[0].x, features.blocks[0].x, atol=1e-5)
    raw, _ = _run(name, blocks=(2,))
    assert np.abs(raw.blocks[0].x - features.blocks[1].x).max() > 0.01


def test_of_a_distilled_and_of_a_headless_model():
    features, _ = _run("deit_tiny_distilled_patch16_224")
    np.testing.assert_allclose(features.pooled, features.tokens.x[:, :2].mean(axis=1), atol=1e-6)
    build = {"num_classes": 0, "pool": "mean", "fc_norm": True, "representation_size": 7}
    features, out = _run("deit_tiny_patch16_224", build=build)
    assert features.pooled.shape == (2, 7)
    np.testing.assert_array_equal(features.pooled, out.logits)


def test_only_what_is_asked_for_is_computed():
    model, variables = _model("deit_tiny_patch16_224"), _variables("deit_tiny_patch16_224")

    def products(**asked):
        run = functools.partial(model.apply, method="features", **asked)
        text = str(jax.make_jaxpr(run)(variables, IMAGES))
        return text.count("dot_general"), text.count("rsqrt")

    plain = str(jax.make_jaxpr(model.apply)(variables, IMAGES)).count("dot_general")
    assert products() == (plain - 1, products(blocks=(0, 1))[1])  # the classifier is left out
    assert products(blocks=(0, 1))[0] == plain - 1
    assert products(blocks=(0, 1), norm=True)[1] == products()[1] + 2


FAMILIES = [*small.names(Isotropic, but=("vit",)), *small.names(RegrownStages), *small.names(DualPathStages)]
QUICK = ("swin",)  # of the others a reduced one runs below
FAMILIES = [n if n.startswith(QUICK) else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]


@pytest.mark.parametrize("name", FAMILIES)
def test_of_every_family(name):
    build = {"num_classes": 5, **small.options(name)}
    model = dyntoken.create_model(name, **build)
    images = np.random.default_rng(0).normal(size=(2, *model.input_shape)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    count = model.plain().taps

    @jax.jit
    def both(variables):
        asked = {"method": "features", "blocks": tuple(range(count))}
        return model.apply(variables, images, **asked), model.apply(variables, images)

    features, out = both(variables)
    head = variables["params"]["head"]["cls"]
    if out.dense is None and "lvvit" not in name:
        np.testing.assert_allclose(
            features.pooled @ head["kernel"] + head["bias"][None], out.logits, atol=1e-5
        )
    for number in range(count):
        tokens = features.block(number)
        dense = dyntoken.unreduce(features, block=number)
        assert dense.shape == (2, *tokens.grid, tokens.x.shape[-1])
        np.testing.assert_array_equal(dense.reshape(tokens.patches.shape), tokens.patches)
    assert features.blocks[-1].grid == features.tokens.grid == dyntoken.unreduce(features).shape[1:3]
    if not model.plain().one_width:
        with pytest.raises(ValueError, match=r"the final norm of .* fits its last stage alone"):
            model.apply(variables, images, method="features", blocks=(0,), norm=True)
        with pytest.raises(ValueError, match=rf"has stages 0 to {count - 1} .* there is no {count}"):
            model.apply(variables, images, method="features", blocks=(count,))


def test_of_a_reduced_stage():
    name = "dtps_pvt_tiny"
    build = {"num_classes": 5, **small.options("pvt_tiny"), "keep": 0.5}
    model = dyntoken.create_model(name, **build)
    images = np.ones((1, *model.input_shape), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    features = jax.jit(functools.partial(model.apply, method="features", blocks=(0, 1)))(variables, images)
    first = features.blocks[0]
    assert first.count < first.initial == first.grid[0] * first.grid[1]
    assert dyntoken.unreduce(features, block=0).shape[1:3] == first.grid


@pytest.mark.parametrize("name", ["dvt_dtps_deit_tiny", "multiexit_deit_tiny_patch16_224"])
def test_of_exits(name):
    cascade = name.startswith("dvt")
    build = {"exits": (2, 4), "at": (1,), "keep": 0.5} if cascade else {"exits": (0, 1)}
    tiny = {key: value for key, value in TINY.items() if not (cascade and key == "patch_size")}
    model = dyntoken.create_model(name, **{**tiny, **build, "depth": 2})
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)

    @jax.jit
    def run(variables):
        asked = {"method": "features", "blocks": (0, -1), "norm": True}
        return (
            model.apply(variables, IMAGES, **asked),
            model.apply(variables, IMAGES, record=("features",)),
            model.apply(variables, IMAGES, upto=0, **asked),
        )

    features, out, one = run(variables)
    assert len(features) == 2 and len(one) == 1
    for index, found in enumerate(features):
        np.testing.assert_allclose(found.tokens.x, out.tokens[index].x, atol=1e-5)
        np.testing.assert_array_equal(found.pooled, found.tokens.x[:, 0])
        np.testing.assert_array_equal(found.tokens.carrier, out.tokens[index].carrier)
    assert features[-1].numbers == (0, 1)
    assert features[0].numbers == ((0, 1) if cascade else (0,))  # block 1 lies behind the first exit
    np.testing.assert_allclose(features[-1].blocks[1].x, features[-1].tokens.x, atol=1e-5)
    np.testing.assert_allclose(one[0].pooled, features[0].pooled, atol=1e-5)
    with pytest.raises(ValueError, match=r"choose one, as in features\[-1\]"):
        dyntoken.unreduce(features)


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ((3,), r"has blocks 0 to 2 \(or -3 to -1\), there is no 3"),
        ((-4,), "there is no -4"),
        (2, r"blocks=2: give the numbers of blocks as a tuple, as in \(-1,\)"),
        (("last",), "give the numbers"),
    ],
)
def test_a_wrong_block(blocks, said):
    name = "deit_tiny_patch16_224"
    with pytest.raises(ValueError, match=said):
        _model(name).apply(_variables(name), IMAGES, method="features", blocks=blocks)


# `unreduce` by itself, on a grid of 3 x 4 with one row before the patches

GRID, N = (3, 4), 12


@st.composite
def reduced(draw):
    """Tokens of which some cells are kept, some merged into a kept row or a fused one, and some dropped."""
    kept = np.array(draw(st.lists(st.integers(0, N - 1), min_size=1, max_size=N, unique=True)))
    fused = draw(st.booleans())
    place = np.concatenate([kept, [-1] * fused])
    carrier = np.array([draw(st.integers(-1, len(place) - 1)) for _ in range(N)])
    carrier[kept] = np.arange(len(kept))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return Tokens(
        x=rng.normal(size=(1, 1 + len(place), 2)).astype(np.float32),
        alive=None,
        place=place[None].astype(np.int32),
        carrier=carrier[None].astype(np.int32),
        size=np.array([[(carrier == row).sum() for row in range(len(place))]], np.float32),
        prefix=1,
        grid=GRID,
    )


@hypothesis.given(reduced())
@hypothesis.settings(max_examples=15)
def test_host_and_zero_are_loops(tokens):
    host, zero = np.zeros((N, 2)), np.zeros((N, 2))
    for cell, row in enumerate(tokens.carrier[0]):
        if row >= 0:
            host[cell] = tokens.x[0, 1 + row]
            if tokens.place[0, row] == cell:
                zero[cell] = tokens.x[0, 1 + row]
    np.testing.assert_array_equal(dyntoken.unreduce(tokens)[0].reshape(N, 2), host)
    np.testing.assert_array_equal(dyntoken.unreduce(tokens, "zero")[0].reshape(N, 2), zero)
    total = (tokens.x[0, 1:] * tokens.size[0][:, None]).sum(axis=0)
    np.testing.assert_allclose(host.sum(axis=0), total, atol=1e-5)
    kept = (zero != 0).all(axis=-1)
    filled = np.asarray(dyntoken.unreduce(tokens, "bilinear")).reshape(N, 2)
    np.testing.assert_array_equal(filled[kept], zero[kept])
    assert (filled <= zero[kept].max(axis=0) + 1e-5).all() and (filled >= zero[kept].min(axis=0) - 1e-5).all()


@pytest.mark.parametrize("fill", ["host", "zero", "bilinear"])
def test_without_reduction_it_is_the_identity_and_gradients_flow(fill):
    tokens = Tokens.start(jnp.arange(26.0).reshape(1, 13, 2), grid=GRID)
    np.testing.assert_array_equal(dyntoken.unreduce(tokens, fill), tokens.patches.reshape(1, 3, 4, 2))
    half = tokens.replace(
        x=tokens.x[:, :3],
        place=jnp.array([[0, 3]]),
        carrier=jnp.array([[0, 0, -1, 1] + [-1] * 8]),
        size=jnp.array([[2.0, 1.0]]),
    )
    grads = jax.grad(lambda x: dyntoken.unreduce(half.replace(x=x), fill).sum())(half.x)[0, :, 0]
    assert np.isfinite(grads).all() and grads[0] == 0
    expected = {"host": [2, 1], "zero": [1, 1]}.get(
        fill, [6, 6]
    )  # the ends share their row; all cells have a value
    np.testing.assert_allclose(grads[1:], expected, atol=1.5 if fill == "bilinear" else 0)
    np.testing.assert_allclose(grads.sum(), sum(expected), atol=1e-4)


def test_what_unreduce_refuses():
    tokens = Tokens.start(jnp.zeros((1, 13, 2)), grid=GRID)
    with pytest.raises(ValueError, match="fill='nearest': give one of host, zero, bilinear"):
        dyntoken.unreduce(tokens, "nearest")
    with pytest.raises(ValueError, match="block= chooses among the blocks of a model's features"):
        dyntoken.unreduce(tokens, block=1)
