"""AdaViT: what a block leaves out, its bound in gather form, training and its loss."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import losses, weights
from dyntoken.reducers.adavit import Choices, Usage
from dyntoken.types import Output

SMALL = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 5}
IMAGES = np.random.default_rng(7).normal(size=(3, 16, 16, 3)).astype(np.float32)


@functools.cache
def _model(**options):
    return dyntoken.create_model("adavit_deit_tiny_patch16_224", **{**SMALL, **options})


@functools.cache
def _variables():
    shapes = jax.eval_shape(_model().init, jax.random.key(0), IMAGES[:1])
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.3, s.shape), s.dtype), shapes)


@functools.cache
def _run(**options):
    model = _model(**options)
    return jax.jit(lambda v, x: model.apply(v, x, record=("blocks", "embed", "features")))(
        _variables(), IMAGES
    )


def test_a_patch_that_is_left_out_keeps_its_value_and_may_come_back():
    out = _run(choose_layers=False, choose_heads=False)
    before = np.asarray(out.records["embed"])
    used = [np.asarray(choice.tokens) > 0.5 for choice in out.state.choices]
    for rows, now in zip(out.records["blocks"], used, strict=True):
        rows = np.asarray(rows)
        np.testing.assert_array_equal(rows[~now], before[~now])
        assert (np.abs(rows - before).max(axis=2) > 0)[now].all() and now[:, 0].all()
        before = rows
    assert any((~first & second).any() for first, second in itertools.pairwise(used))


def test_a_sub_layer_that_is_left_out_adds_nothing():
    out = _run(choose_tokens=False, choose_heads=False)
    rows = [out.records["embed"], *out.records["blocks"]]
    for block, choice in enumerate(out.state.choices[1:], start=1):
        neither = np.asarray(choice.layers).max(axis=1) == 0
        change = np.abs(np.asarray(rows[block + 1]) - np.asarray(rows[block])).max(axis=(1, 2))
        np.testing.assert_array_equal(change == 0, neither)
    assert out.state.choices[0].layers is None  # keep_blocks


def test_a_bound_that_cuts_nothing_changes_nothing_and_both_forms_agree_where_it_cuts():
    most = max(int(np.asarray(c.tokens)[:, 1:].sum(axis=1).max()) for c in _run().state.choices)
    assert most < 16
    bound = _run(keep=(most,) * 3)
    np.testing.assert_allclose(bound.logits, _run().logits, atol=1e-5)
    assert [rows.shape[1] for rows in bound.records["blocks"]] == [1 + most] * 3
    assert bound.tokens.x.shape[1] == 17
    few = (3, 2, 4)
    np.testing.assert_allclose(_run(keep=few).logits, _run(keep=few, form="mask").logits, atol=1e-5)


def test_training_is_keyed_by_example_and_one_step_lowers_the_objective():
    specs = {"ce": {}, "usage": {"weight": 2.0, "minimum": 1.0}}
    specs |= {
        f"usage#{p}": {"part": p, "weight": 2.0, "diversity": 0.1, "entropy": 0.1}
        for p in ("heads", "layers")
    }
    objective, batch = losses.Objective(specs), {"target": jnp.eye(5)[:3]}

    def loss(params, images, ids, target):
        rngs = {"policy": jax.random.key(1)}
        out = _model().apply({"params": params}, images, train=True, ids=ids, rngs=rngs)
        return objective.total(objective.evaluate(out, {"target": target})), out.logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    params = _variables()["params"]
    (before, logits), grads = step(params, IMAGES, jnp.arange(3), batch["target"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert "select" not in str(path) or np.abs(leaf).max() > 0, path
    (_, turned), _ = step(params, IMAGES[::-1], jnp.arange(3)[::-1], batch["target"][::-1])
    np.testing.assert_allclose(turned, logits[::-1], atol=1e-5)
    smaller = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
    assert step(smaller, IMAGES, jnp.arange(3), batch["target"])[0][0] < before


def _output(**fields):
    return Output(logits=jnp.zeros((2, 5)), state=Usage((Choices(**fields),)))


def test_usage_of_patches_layers_and_heads():
    usage = losses.LOSSES["usage"]
    tokens = jnp.asarray([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    out = _output(tokens=tokens, token_logits=tokens)
    total, count = usage(out, {}, target=0.5, minimum=1.0)
    assert count == 2 and total / count == pytest.approx((3 / 8 - 0.5) ** 2 + 0.1)
    assert usage(out, {"mask": jnp.asarray([1, 0])}, target=0.5)[0] == pytest.approx(0.25**2)
    layers = jnp.asarray([[1.0, 0.0], [0.0, 0.0]])
    heads = jnp.asarray([[1.0, 0.0], [1.0, 1.0]])
    zeros = jnp.zeros((2, 2))  # entropy log 2
    out = _output(layers=layers, heads=heads, layer_logits=zeros, head_logits=zeros)
    total, count = usage(out, {}, part="layers", diversity=0.1, entropy=0.1)
    assert total / count == pytest.approx(0.25 + 0.1 * 0.25 - 0.1 * np.log(2), rel=1e-5)
    total, count = usage(out, {}, part="heads", diversity=0.1)  # the second sample runs no sub-layer
    assert total / count == pytest.approx(0.0 + 0.1 * 0.5, abs=1e-5)
    with pytest.raises(ValueError, match="chooses its tokens, as adavit_"):
        usage(out, {}, part="tokens")


def test_official_keys_and_bad_requests():
    flat = weights.export_reference(_model(), _variables())
    assert flat["blocks.1.attn.key.weight"].shape == (16, 16)
    assert flat["blocks.0.attn.token_select.mlp_head.weight"].shape == (1, 16)
    assert "blocks.0.head_select.mlp_head.weight" not in flat
    assert flat["blocks.2.layer_select.mlp_head.bias"].shape == (2,)
    with pytest.raises(ValueError, match="pass rngs"):
        _model().apply(_variables(), IMAGES, train=True)
    with pytest.raises(ValueError, match=r"not one stack|first one of a stage"):
        dyntoken.create_model("adavit_pvt_tiny")
    with pytest.raises(ValueError, match="ada_head_v2"):
        given = {"ada_token": True, "ada_head_v2": True}
        weights.official.build("MengLcool/AdaViT", "AdaStepT2T_ViT", given)
