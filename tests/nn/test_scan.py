"""Blocks as one loop: the numbers of the unrolled trunk, from the same parameters."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.analysis import macs
from dyntoken.nn.block import Block
from dyntoken.nn.scan import runs
from dyntoken.nn.spec import Spec

SMALL = {"img_size": 16, "patch_size": 4, "width": 16, "heads": 2, "num_classes": 5}
SITES = {"depth": 4, "at": (2,), "keep": 0.6}
NOISY = {"dropout": 0.1, "drop_path": 0.3}
MODELS = {
    "quick": ("dtps_deit_tiny_patch16_224", {"depth": 2, "at": (0,), "form": "gather", "drop_path": 0.3}),
    "deit": ("deit_tiny_patch16_224", {"depth": 3, **NOISY}),
    "dynamicvit+mask": ("dynamicvit_deit_tiny_patch16_224", {**SITES, **NOISY, "form": "mask"}),
    "dtps": ("dtps_deit_tiny_patch16_224", {**SITES, **NOISY}),
    "dtps+gather": ("dtps_deit_tiny_patch16_224", {**SITES, **NOISY, "form": "gather"}),
    "evit": ("evit_deit_tiny_patch16_224", {**SITES, "depth": 5, **NOISY, "remat": "dots_saveable"}),
    "etps+mask": ("etps_deit_tiny_patch16_224", {**SITES, **NOISY, "form": "mask", "remat": True}),
    "lvvit": ("dtps_lvvit_s", {**SITES, **NOISY, "stem": "patch", "aux_weight": 0.5}),
    "dvt": ("dvt_deit_small", {"exits": (2, 4), "depth": 3, "drop_path": 0.3}),
    "dvt+dtps": ("dvt_dtps_deit_small", {"exits": (2, 4), "depth": 4, "at": (2,), "keep": 0.6}),
    "multiexit": ("multiexit_deit_tiny_patch16_224", {"depth": 5, "exits": (2, 4), "drop_path": 0.3}),
}
CASES = [name if name == "quick" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def _model(case, **more):
    name, options = MODELS[case]
    small = {k: v for k, v in SMALL.items() if k != "patch_size" or not case.startswith("dvt")}
    return dyntoken.create_model(name, **{**small, **options, **more})


@functools.cache
def _images():
    return np.random.default_rng(7).normal(size=(4, 16, 16, 3)).astype(np.float32)


def _variables(case):
    """Random weights of some size: right after initialisation the scores nearly tie."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: _model(case).init(jax.random.key(0), _images()))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.15, s.shape), s.dtype), shapes)


def _passes(case, scan):
    """(evaluation logits, training loss, its gradient), in one program."""
    model = _model(case, scan=scan)
    rngs = {"policy": jax.random.key(1), "dropout": jax.random.key(2)}

    def loss(variables):
        out = model.apply(variables, _images(), train=True, rngs=rngs, ids=jnp.arange(4) + 3)
        shares = sum((r.decision.mean() - 0.5) ** 2 for r in getattr(out, "reductions", ()))
        return (jax.nn.log_softmax(out.logits) ** 2).mean() + shares

    def both(variables):
        return model.apply(variables, _images()).logits, *jax.value_and_grad(loss)(variables)

    return jax.jit(both)(_variables(case))


@pytest.mark.parametrize("case", CASES)
def test_a_loop_computes_what_the_blocks_compute(case):
    logits, loss, grads = _passes(case, False)
    looped_logits, looped_loss, looped_grads = _passes(case, True)
    np.testing.assert_allclose(looped_logits, logits, atol=2e-5)
    assert float(looped_loss) == pytest.approx(float(loss), rel=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    chex.assert_trees_all_close(looped_grads, grads, atol=2e-5 * scale, rtol=1e-4)


def test_parameters_stay_one_tree_per_block():
    models = [_model("dtps", scan=scan) for scan in (False, True)]
    trees = [jax.eval_shape(model.init, jax.random.key(0), _images()) for model in models]
    chex.assert_trees_all_equal_shapes_and_dtypes(*trees)
    assert {f"blocks_{i}" for i in range(4)} < set(trees[1]["params"]["backbone"]["trunk"])


def test_runs_end_at_sites_and_where_blocks_differ():
    def recipe(layer, **more):
        return Spec.of(Block, layer=layer, heads=2, width=8, drop_path=0.1 * layer, **more)

    recipes = [*(recipe(i) for i in range(6)), recipe(6, context=3)]
    assert runs(recipes, (), range(7)) == [(0, 1, 2, 3, 4, 5), (6,)]
    assert runs(recipes, (2, 4, 5), range(6)) == [(0, 1), (2, 3), (4,), (5,)]
    assert runs(recipes, (2,), range(3, 6)) == [(3, 4, 5)]


@pytest.mark.parametrize(("case", "blocks", "bodies"), [("dtps", 4, 2), ("evit", 5, 3)])
def test_a_program_holds_each_run_once(case, blocks, bodies):
    """dtps: the loops 0-1, 2-3. evit, whose block 2 holds a reducer: 0-1, 2, 3-4."""
    predictor = 3 if case == "dtps" else 0  # GELUs of the reducer
    for scan, expected in ((False, blocks), (True, bodies)):
        model = _model(case, scan=scan)
        jaxpr = jax.make_jaxpr(lambda v, m=model: m.apply(v, _images()).logits)(_variables(case))
        assert str(jaxpr).count("erf") == expected + predictor


@pytest.mark.slow
def test_records_of_a_loop():
    for scan in (False, True):
        model = _model("dtps", scan=scan)
        found = jax.jit(lambda v, m=model: m.apply(v, _images(), record=("blocks", "stages", "embed")))
        if not scan:
            expected = found(_variables("dtps")).records
        else:
            chex.assert_trees_all_close(found(_variables("dtps")).records, expected, atol=1e-4)


def test_multiply_adds_are_counted_per_block():
    counts = [macs.count(_model("dtps", scan=scan)) for scan in (False, True)]
    assert counts[0] == counts[1] and len(counts[1].by_block) == 4
