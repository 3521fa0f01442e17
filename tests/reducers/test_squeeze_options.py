"""What the squeeze compares and weighs by: in both forms alike, and refused where nothing reads it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.reducers import make_reducer
from dyntoken.types import Tokens

SMALL = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 5}
IMAGES = jax.random.normal(jax.random.key(7), (4, 16, 16, 3))
OPTIONS = {
    "dtps": (
        {},
        {"similarity": "keys", "measure": "l2", "weight": "size"},
        {"measure": "random", "weight": "mean"},
    ),
    "etps": ({"similarity": "values", "measure": "dot", "weight": "score", "temperature": 4.0},),
    "dynamicvit": ({}, {"score_head": "local"}),
}
MORE = {
    "dtps": (
        {"similarity": "queries", "weight": "score", "fuse": "mean"},
        {"score": "random", "similarity": "values", "weight": "size"},
        {"score_head": "local", "temperature": 0.5},
    ),
    "etps": (
        {"similarity": "queries", "measure": "random", "weight": "mean"},
        {"score": "random", "similarity": "keys"},
    ),
    "spvit": ({"score_head": "local"},),
}
CASES = [(m, o) for m, some in OPTIONS.items() for o in some]
CASES += [pytest.param(m, o, marks=pytest.mark.slow) for m, some in MORE.items() for o in some]


def _model(method, form, options):
    name = f"{method}_deit_tiny_patch16_224"
    return dyntoken.create_model(name, **SMALL, at=(1, 2), keep=0.6, form=form, **options)


@functools.cache
def _variables(method):
    """Random weights of some size: right after initialisation the scores nearly tie."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: _model(method, "auto", {}).init(jax.random.key(0), IMAGES))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.2, s.shape), s.dtype), shapes)


@functools.cache
def _logits(method, form, options):
    model = _model(method, form, dict(options))
    return jax.jit(lambda v: model.apply(v, IMAGES).logits)(_variables(method))


@pytest.mark.thorough
@pytest.mark.parametrize(("method", "options"), CASES)
def test_both_forms_are_one_function_and_no_option_is_idle(method, options):
    key = tuple(options.items())
    gathered = _logits(method, "gather", key)
    np.testing.assert_allclose(_logits(method, "mask", key), gathered, atol=2e-5)
    if options:
        assert np.abs(gathered - _logits(method, "gather", ())).max() > 1e-4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "dynamicvit_deit",
            {"measure": "dot"},
            "measure='dot' is of a rule that merges: fuse=mean or squeeze",
        ),
        ("evit_deit", {"weight": "size"}, "fuse=squeeze"),
        ("dtps_deit", {"fuse": "mean", "temperature": 2.0}, "fuse=squeeze"),
        ("etps_deit", {"score_head": "local"}, "is of a learnt scorer: score=predictor or head_predictor"),
        ("dtps_deit", {"similarity": "dot"}, "similarity is 'dot': known: keys, queries, tokens, values"),
        (
            "dtps_deit",
            {"similarity": "keys", "at": (0, 1)},
            "attention keys, and they have some only at block",
        ),
        ("dtps_pvt", {"similarity": "values"}, "attention values, and no value there is that of one patch"),
        ("tome_deit", {"measure": "dot"}, "measure"),
    ],
)
def test_what_does_not_fit_is_refused(name, options, message):
    arch = f"{name}_tiny_patch16_224" if name.endswith("deit") else f"{name}_tiny"
    with pytest.raises(ValueError, match=message):
        dyntoken.create_model(arch, **options).sites()


def test_a_random_host_is_any_that_stays():
    x = jax.random.normal(jax.random.key(0), (1, 40, 4))
    reducer = make_reducer("dtps", score="random", keep=4, form="gather", measure="random")
    tokens = Tokens.start(jnp.concatenate([x[:, :1], x], axis=1), grid=(5, 8))
    hosts = reducer.apply({}, tokens)[1].remap
    assert np.bincount(np.asarray(hosts)[0], minlength=4).min() >= 4  # of 36 that leave, and 4 that stay
