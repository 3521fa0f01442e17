"""Training of learnt decisions in gather form: rows really leave, and the decision still learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.models import pairings
from dyntoken.nn.block import Block
from dyntoken.ops import sample, select
from dyntoken.reducers import METHODS, make_reducer
from dyntoken.types import Tokens
from tests.backbones import small

SMALL = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 5}
SAMPLED = [name for name, row in METHODS.items() if hasattr(row.plain, "score") and row.plain.learns]
BACKBONES = small.names(object, but=("vit", "t2t"))
IMAGES = np.random.default_rng(7).normal(size=(4, 32, 32, 3)).astype(np.float32)


@functools.cache
def _model(name, form="gather"):
    arch = name.partition("_")[2]
    options = SMALL if arch.startswith("deit") else {"num_classes": 5, **small.options(arch)}
    model = dyntoken.create_model(name, **options, form=form, keep=0.6)
    return model if len(model.at) < 3 else model.clone(at=model.at[:2])


@functools.cache
def _variables(name):
    """Random weights of some size: right after initialisation the scores nearly tie."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: _model(name).init(jax.random.key(0), _images(name)))
    tree = jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.2, s.shape), s.dtype), shapes)
    return {k: jax.tree.map(jnp.abs, v) if k == "batch_stats" else v for k, v in tree.items()}


def _images(name):
    return jnp.asarray(IMAGES[:, : _model(name).input_shape[0], : _model(name).input_shape[1]])


@functools.cache
def _trained(name, noise=True):
    """Output and gradients; `noise` drawn, or zeros."""

    @functools.partial(jax.value_and_grad, has_aux=True)
    def train(params):
        variables = {**_variables(name), "params": params}
        zeros = tuple(jnp.zeros((4, *shape)) for shape in _noise_shapes(name))
        out = _model(name).apply(
            variables,
            _images(name),
            train=True,
            noise=None if noise else zeros,
            rngs={"policy": jax.random.key(1), "dropout": jax.random.key(2)},
            mutable=["batch_stats"],
        )[0]
        return (jax.nn.log_softmax(out.logits) ** 2).sum(), out

    (_, out), grads = jax.jit(train)(_variables(name)["params"])
    return out, grads


def _noise_shapes(name):
    return [(site.reducer["current"], 2) for site in _model(name).sites()]


def _cases():
    pairs = [(m, b) for m in SAMPLED for b in ("deit_tiny_patch16_224", *BACKBONES)]
    names = [f"{m}_{b}" for m, b in pairs if pairings(b)[m] is None]
    quick = [f"{m}_deit_tiny_patch16_224" for m in SAMPLED]
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.thorough
@pytest.mark.parametrize("name", _cases())
def test_training_reaches_the_decision(name):
    out, grads = _trained(name)
    assert all(r.keep.shape[1] < r.decision.shape[1] for r in out.reductions)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all(), path
        if "reducer" in path:
            assert float(jnp.abs(leaf).max()) > 0, path


@pytest.mark.thorough
@pytest.mark.parametrize("method", SAMPLED)
def test_without_noise_it_computes_what_evaluation_does(method):
    name = f"{method}_deit_tiny_patch16_224"
    evaluated = jax.jit(lambda v: _model(name).apply(v, _images(name)))(_variables(name))
    trained = _trained(name, noise=False)[0]
    np.testing.assert_allclose(trained.logits, evaluated.logits, atol=1e-6)
    for one, other in zip(trained.reductions, evaluated.reductions, strict=True):
        np.testing.assert_array_equal(one.keep, other.keep)
        np.testing.assert_array_equal(one.decision, other.decision)


def test_the_mask_is_that_of_top_k_with_the_slope_of_a_sigmoid_at_the_cut():
    logits = jnp.asarray([[0.0, 3.0, -1.0, 2.0]])
    kept, dropped = select.split(logits, 2)
    mask, pull = jax.vjp(lambda x: sample.top_k_mask(x, kept, dropped, temperature=2.0), logits)
    np.testing.assert_array_equal(mask, [[0.0, 1.0, 0.0, 1.0]])
    soft = 1 / (1 + np.exp(-(np.asarray(logits) - 1.0) / 2.0))  # the cut lies halfway between 2 and 0
    np.testing.assert_allclose(pull(jnp.ones((1, 4)))[0], soft * (1 - soft) / 2.0, rtol=1e-6)
    moved, pull_moved = jax.vjp(lambda x: sample.top_k_mask(x, kept, dropped, temperature=2.0), logits + 50)
    np.testing.assert_array_equal(moved, mask)
    np.testing.assert_allclose(pull_moved(jnp.ones((1, 4)))[0], pull(jnp.ones((1, 4)))[0], rtol=1e-5)
    everything = select.split(logits, 4)
    np.testing.assert_array_equal(sample.top_k_mask(logits, *everything), np.ones((1, 4)))


def _reduced(method, noise, weight=None):
    x = jax.random.normal(jax.random.key(0), (2, 1 + 6, 8))
    reducer = make_reducer(method, keep=3, form="gather", current=6)
    tokens = Tokens.start(x, grid=(2, 3)).replace(weight=weight)
    variables = reducer.init(jax.random.key(1), tokens)
    return reducer.apply(variables, tokens, train=True, noise=noise)


def test_noise_decides_and_weights_multiply():
    noise = jnp.zeros((2, 6, 2)).at[0, :3, 0].set(50.0).at[1, 3:, 1].set(-50.0)
    earlier = jnp.arange(1.0, 13.0).reshape(2, 6)
    tokens, reduction = _reduced("dynamicvit", noise, earlier)
    np.testing.assert_array_equal(np.sort(reduction.keep, axis=1), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(reduction.decision, [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(tokens.weight, np.take_along_axis(earlier, reduction.keep, axis=1))


def test_keys_learn_by_how_much_attention_would_change():
    """The gradient of a key's weight is that of repeating the key that often."""
    layer = Block(layer=0, heads=2, width=16)
    x = jax.random.normal(jax.random.key(3), (1, 5, 16))
    tokens = Tokens.start(x, grid=(2, 2))
    variables = layer.init(jax.random.key(4), tokens, None, False, False, method="attend")
    variables = jax.tree.map(
        lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), variables
    )

    def after(x, weight=None):
        start = Tokens.start(x, grid=(1, x.shape[1] - 1)).replace(weight=weight)
        return layer.apply(variables, start, None, True, False, method="attend")[0].x[:, 0].sum()

    ones = jnp.ones((1, 4))
    np.testing.assert_allclose(after(x, ones), after(x), rtol=1e-6)
    twice = after(jnp.concatenate([x, x[:, 2:3]], axis=1))  # patch 1 stands there twice
    np.testing.assert_allclose(after(x, ones.at[0, 1].set(2.0)), twice, rtol=1e-5)
    assert (np.abs(jax.grad(after, argnums=1)(x, ones)) > 0).all()


def test_training_without_noise_or_key_says_what_to_pass():
    with pytest.raises(ValueError, match="pass rngs="):
        _reduced("dtps", None)
