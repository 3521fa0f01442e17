"""Every method, in both forms, in each isotropic backbone besides DeiT (tests/test_models.py) and T2T.

Backbones that are registered besides are taken as well. The default run takes one learnt method (which changes
tokens before a block) in LV-ViT and one of class attention (inside a block, with a fused row) in PS-ViT; the rest of
the product is marked slow.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.backbones.isotropic import Isotropic
from dyntoken.models import pairings
from dyntoken.reducers import METHODS
from tests.backbones import small

SHARED = {"num_classes": 5, "at": (1,), "keep": 0.6}
BACKBONES = small.names(Isotropic, but=("vit", "t2t"))
IMAGES = np.random.default_rng(7).normal(size=(4, 16, 16, 3)).astype(np.float32)


def _cases(*quick, forms=1):
    able = [m for m, row in METHODS.items() if forms <= len(row.plain.forms)]
    cases = [f"{m}_{b}" for b in BACKBONES for m in able if pairings(b)[m] is None]
    return [n if n.startswith(quick) else pytest.param(n, marks=pytest.mark.slow) for n in cases]


@functools.cache
def _model(name, form="auto"):
    backbone = next(backbone for backbone in BACKBONES if name.endswith(f"_{backbone}"))
    return dyntoken.create_model(name, **SHARED, **small.options(backbone), form=form)


@functools.cache
def _variables(name):
    """Random weights of some size: right after initialisation the scores nearly tie."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: _model(name).init(jax.random.key(0), IMAGES[:1]))

    def fill(path, s):
        # LTMP's thresholds: about 1, all rows would die and none merge.
        if "threshold" in jax.tree_util.keystr(path):
            return jnp.full(s.shape, 0.05, s.dtype)
        return jnp.asarray(rng.normal(s.ndim == 1, 0.15, s.shape), s.dtype)

    tree = jax.tree_util.tree_map_with_path(fill, shapes)
    return {**tree, "batch_stats": jax.tree.map(jnp.abs, tree.get("batch_stats", {}))}


@pytest.mark.parametrize("name", _cases("dtps_lvvit", "evit_psvit", forms=2))
def test_mask_form_chooses_what_gather_chooses(name):
    run = jax.jit(lambda m, v: m.apply(v, IMAGES, record=("features",)), static_argnums=0)
    kept, masked = (run(_model(name, form), _variables(name)) for form in ("gather", "mask"))
    np.testing.assert_allclose(masked.logits, kept.logits, atol=2e-5)
    assert kept.tokens.count == kept.reductions[0].count < masked.tokens.initial == 16
    np.testing.assert_array_equal(
        np.asarray(kept.tokens.size).sum(axis=1), (kept.tokens.carrier >= 0).sum(axis=1)
    )


@pytest.mark.thorough
@pytest.mark.parametrize("name", _cases("dtps"))
def test_training_reaches_every_parameter_and_every_statistic(name):
    record = ("dense", "features") if "lvvit" in name else ("features",)

    @functools.partial(jax.grad, has_aux=True)
    def train(params, stats):
        variables, rngs = {"params": params, "batch_stats": stats}, {"policy": jax.random.key(1)}
        out, new = _model(name).apply(
            variables, IMAGES, train=True, rngs=rngs, record=record, mutable=["batch_stats"]
        )
        loss = (jax.nn.log_softmax(out.logits) ** 2).sum()
        # Half of the rows stay exactly under LTMP, which decides in the last block, too late for the logits.
        loss += sum((r.decision.mean() - 0.4) ** 2 for r in out.reductions)
        return loss + (0.0 if out.dense is None else (out.dense**2).mean()), new.get("batch_stats", {})

    grads, stats = jax.jit(train)(_variables(name)["params"], _variables(name)["batch_stats"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all() and float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)
    old = _variables(name)["batch_stats"]
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(old), strict=True))
