"""Every method, in both forms, in the backbones that reduce stage by stage; their maps, sites and draws.

The default run takes a learnt method in PVT and class attention in CvT, and trains in CvT; the rest is
marked slow.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.backbones.staged_regrown import RegrownStages
from dyntoken.models import pairings
from dyntoken.nn.spatial import to_map
from dyntoken.reducers import METHODS
from dyntoken.types import Tokens
from tests.backbones import small

SHARED = {"num_classes": 5, "keep": 0.6}
BACKBONES = small.names(RegrownStages)
IMAGES = np.random.default_rng(7).normal(size=(4, 16, 16, 3)).astype(np.float32)
RNGS = {"policy": jax.random.key(1)}


def _cases(*quick, forms=1):
    """`method_backbone`, with "+last" where dropped cells keep their value."""
    able = [m for m, row in METHODS.items() if forms <= len(row.plain.forms)]
    names = [f"{m}_{b}" for b in BACKBONES for m in able if pairings(b)[m] is None]
    names += [f"{name}+last" for name in names if name.startswith(("dtps", "etps_cvt"))]
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@functools.cache
def _model(case, form="auto", **options):
    name, _, dropped = case.partition("+")
    method, _, backbone = name.partition("_")
    depths = (1, 1 + METHODS[method].inside)  # a block's attention after the site
    options = {**SHARED, **small.options(backbone), "depths": depths, **options}
    return dyntoken.create_model(name, **options, form=form, dropped=dropped or "zero")


@functools.cache
def _variables(name):
    """Random weights of some size: right after initialisation the scores nearly tie."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: _model(name).init(jax.random.key(0), IMAGES[:1]))
    tree = jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.15, s.shape), s.dtype), shapes)
    return {**tree, **({"batch_stats": jax.tree.map(jnp.abs, tree["batch_stats"])} if len(tree) > 1 else {})}


@functools.cache
def _gathered(case):
    run = jax.jit(lambda v, x: _model(case, "gather").apply(v, x, record=("features",)))
    out = run(_variables(case), IMAGES)
    run(_variables(case), IMAGES + 1)
    assert run._cache_size() == 1
    return out


QUICK = ("dtps_pvt_tiny", "etps_cvt_13+last")


@pytest.mark.parametrize("case", _cases(*QUICK, forms=2))
def test_mask_form_with_gathers_kept_set_equals_gather(case):
    gathered = _gathered(case)
    kept = [np.asarray(r.keep)[:, :, None] == np.arange(r.grid[0] * r.grid[1]) for r in gathered.reductions]
    decisions = [jnp.asarray(k.any(axis=1), jnp.float32) for k in kept]
    run = jax.jit(lambda v, x, d: _model(case, "mask").apply(v, x, decisions=d))
    masked = run(_variables(case), IMAGES, decisions)
    np.testing.assert_allclose(masked.logits, gathered.logits, atol=2e-5)
    for g, m in zip(gathered.reductions, masked.reductions, strict=True):
        np.testing.assert_array_equal(g.decision, m.decision)
        assert (g.count, g.ratio, g.grid) == (m.count, m.ratio, m.grid)


@pytest.mark.parametrize("case", _cases(forms=2))
def test_mask_form_chooses_what_gather_chooses(case):
    masked = jax.jit(lambda v, x: _model(case, "mask").apply(v, x).logits)(_variables(case), IMAGES)
    np.testing.assert_allclose(masked, _gathered(case).logits, atol=2e-5)


@pytest.mark.parametrize("case", _cases(*QUICK))
def test_every_stage_reduces_its_own_grid(case):
    out, model = _gathered(case), _model(case)
    body = model.plain()
    assert [r.grid for r in out.reductions] == [body.grids[stage] for stage in model.at]
    for r in out.reductions:
        cells = r.grid[0] * r.grid[1]
        expected = int(cells * 0.6) if model.at[0] == 0 else -int(-cells * 0.6 // 1)
        assert r.keep.shape == (4, expected) and r.carrier.shape == (4, cells)
        kept = np.take_along_axis(np.asarray(r.carrier), np.asarray(r.keep), axis=1)
        np.testing.assert_array_equal(kept, np.broadcast_to(np.arange(expected), kept.shape))
    assert out.tokens.grid == body.grid and out.tokens.count == out.reductions[-1].count


@pytest.mark.parametrize("case", _cases("dtps_cvt_13"))
def test_training_reaches_every_parameter_and_every_statistic(case):
    @functools.partial(jax.grad, has_aux=True)
    def train(params, rest):
        out, new = _model(case).apply(
            {"params": params, **rest}, IMAGES, train=True, rngs=RNGS, mutable=["batch_stats"]
        )
        return (jax.nn.log_softmax(out.logits) ** 2).sum(), new

    params, rest = _variables(case)["params"], {k: v for k, v in _variables(case).items() if k != "params"}
    grads, new = jax.jit(train)(params, rest)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all(), name
        # The last block's class token passes by the convolution that makes the patches' queries.
        last = f"stage_1/trunk/blocks_{_model(case).plain().depths[-1] - 1}/attn/conv_proj_q"
        assert (float(jnp.abs(leaf).max()) > 0) is (last not in name), name
    assert jax.tree.structure(new) == jax.tree.structure(rest)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(rest), strict=True))


def test_a_map_shows_zeros_or_the_last_value_where_a_row_was_dropped():
    tokens = Tokens.start(jnp.zeros((1, 5, 1)), prefix=1, grid=(2, 2))
    rows, last = jnp.asarray([[[3.0], [1.0]]]), -jnp.ones((1, 4, 1))
    # Cell 3 is kept as row 0 and has absorbed cell 0, cell 1 as row 1; cell 2 is gone.
    kept = tokens.replace(place=jnp.asarray([[3, 1]]), carrier=jnp.asarray([[0, 1, -1, 0]]))
    alive = tokens.replace(alive=jnp.asarray([[0.0, 1.0, 0.0, 1.0]]))
    full = jnp.asarray([[[9.0], [1.0], [9.0], [3.0]]])
    for found, empty in ((0, None), (-1, last)):
        expected = np.array([[found, 1], [found, 3]], np.float32)[None, :, :, None]
        np.testing.assert_array_equal(to_map(kept, rows, empty), expected)
        np.testing.assert_array_equal(to_map(alive, full, empty), expected)
    slope = jax.grad(lambda a: to_map(tokens.replace(alive=a), full, last).sum())(alive.alive)
    np.testing.assert_array_equal(slope, [[10, 2, 10, 4]])


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_dropped_cells_show_what_was_asked_for(name):
    zero, last = (_gathered(f"dtps_{name}{more}").logits for more in ("", "+last"))
    assert np.abs(zero - last).max() > 1e-3


def test_every_stage_draws_for_itself_and_noise_replaces_the_draws():
    """Two stages with grids of one size, which would repeat their draws if both were site 0."""
    model = _model("dynamicvit_cvt_13", patch_strides=(4, 1), score="random")
    run = jax.jit(lambda v: model.apply(v, IMAGES, rngs=RNGS).reductions)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES[:1]))
    first, second = run(jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes))
    assert first.grid == second.grid == (4, 4) and np.abs(first.scores - second.scores).min() > 1e-4


def test_noise_and_decisions_reach_their_stages():
    case = "dynamicvit_pvt_tiny"
    sizes = [n * m for n, m in _model(case).plain().grids]
    keep = [np.arange(4 * n).reshape(4, n) % (3 + i) == 0 for i, n in enumerate(sizes)]
    noise = [jnp.stack([jnp.where(k, 50.0, -50.0), jnp.zeros_like(k, float)], axis=-1) for k in keep]
    run = jax.jit(lambda v, noise: _model(case).apply(v, IMAGES, train=True, noise=noise).reductions)
    for r, k in zip(run(_variables(case), noise), keep, strict=True):
        np.testing.assert_array_equal(r.decision, k)
