"""A-ViT: halting against a loop over tokens, its bound in both forms, its losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import losses
from dyntoken.losses.halting import prior_of
from dyntoken.types import Output

SMALL = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 4, "heads": 2, "num_classes": 5, "at": (2, 3)}
GATE = {"gate_scale": 1.0, "gate_center": 0.7}
IMAGES = np.random.default_rng(7).normal(size=(2, 16, 16, 3)).astype(np.float32)
BATCH = {"target": np.eye(5, dtype=np.float32)[[1, 3]]}


@functools.cache
def _model(**options):
    return dyntoken.create_model("avit_deit_tiny_patch16_224", **{**SMALL, **GATE, **options})


@functools.cache
def _variables():
    shapes = jax.eval_shape(_model().init, jax.random.key(0), IMAGES[:1])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.3, s.shape), s.dtype), shapes)


@functools.cache
def _run(**options):
    model = _model(**options)
    return jax.jit(lambda v, x: model.apply(v, x, record=("blocks", "features")))(_variables(), IMAGES)


def test_the_output_is_each_tokens_mean_over_depth():
    out = _run()
    assert {1.0, 2.0, 3.0} & set(np.unique(out.state.depth)) and np.unique(out.state.depth).size > 1
    for b, t in np.ndindex(2, 17):
        total, rest, value, cost = 0.0, 1.0, 0.0, 0.0
        for block, rows in enumerate(out.records["blocks"]):
            x = np.asarray(rows, np.float64)[b, t]
            h = 1.0 if block == 3 else 1 / (1 + np.exp(-(x[0] - 0.7)))
            assert out.state.masks[block][b, t] == 1
            total, cost = total + h, cost + 1
            if total > 0.99:
                value, cost = value + rest * x, cost + rest
                break
            value, rest = value + h * x, rest - h
        np.testing.assert_allclose(out.state.ponder[b, t], cost, rtol=1e-5)
        np.testing.assert_allclose(out.state.output[b, t], value, atol=1e-4)


def test_halted_rows_are_zero_to_the_next_block_and_seen_by_nobody():
    out = _run()
    halted = np.asarray(out.state.masks[2][0, 1:]) == 0
    assert halted.any() and not halted.all()
    rows = np.asarray(out.records["blocks"][2][0, 1:])[halted]
    np.testing.assert_allclose(rows, np.broadcast_to(rows[:1], rows.shape), atol=1e-5)


def test_a_bound_that_cuts_only_halted_rows_changes_nothing():
    alive = max(int(np.asarray(_run().state.masks[block])[:, 1:].sum(axis=1).max()) for block in (2, 3))
    assert alive < 16
    bound = _run(keep=alive)
    assert bound.tokens.x.shape[1] == 1 + alive
    np.testing.assert_allclose(bound.logits, _run().logits, atol=1e-5)


def test_both_forms_agree_where_the_bound_cuts():
    late = {"gate_center": 9.0}
    gather, mask = _run(keep=(5, 3), **late), _run(keep=(5, 3), form="mask", **late)
    assert [rows.shape[1] for rows in gather.records["blocks"]] == [17, 17, 6, 4]
    np.testing.assert_allclose(gather.logits, mask.logits, atol=1e-5)
    assert not np.allclose(gather.logits, _run(**late).logits)
    assert np.isfinite(np.asarray(mask.state.ponder)).all()


def test_one_training_step_lowers_the_objective():
    objective = losses.Objective(
        {"ce": {}, "ponder": {"weight": 0.05}, "halting_prior": {"weight": 0.1, "reference": True}}
    )

    def loss(params):
        out = _model().apply({"params": params}, IMAGES, train=True)
        return objective.total(objective.evaluate(out, BATCH))

    step = jax.jit(jax.value_and_grad(loss))
    before, grads = step(_variables()["params"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    after, _ = step(jax.tree.map(lambda p, g: p - 0.01 * g, _variables()["params"], grads))
    assert after < before


def _output(scores, prefix=1):
    state = _run().state.replace(scores=scores, ponder=jnp.asarray([[1.0, 3.0], [2.0, 8.0]]), prefix=prefix)
    return Output(logits=jnp.zeros((2, 5)), state=state)


def test_ponder_is_a_mean_over_tokens_and_rows_that_count():
    assert losses.LOSSES["ponder"](_output(()), {}) == (7.0, 2.0)
    assert losses.LOSSES["ponder"](_output(()), {"mask": jnp.asarray([1, 0])}) == (2.0, 1.0)


def test_halting_prior_reads_patches_of_all_rows_and_the_official_one_all_but_the_first_row():
    scores = tuple(jnp.asarray([[9.0, a], [b, b]]) for a, b in ((0.1, 0.3), (0.4, 0.2), (0.3, 0.5)))
    means = {False: np.asarray([0.2, 0.3, 0.4]), True: np.asarray([0.3, 0.2, 0.5])}
    for reference, mean in means.items():
        prior = np.exp(-0.5 * (np.arange(3) - 1.0) ** 2)
        prior *= 0.98 / prior[:1].sum() if reference else 1 / prior.sum()
        np.testing.assert_allclose(prior_of(3, 1.0, reference=reference), prior, rtol=1e-6)
        expected = (prior * np.log(prior / (mean / mean.sum()))).sum() / 3
        total, count = losses.LOSSES["halting_prior"](_output(scores), {}, center=1.0, reference=reference)
        np.testing.assert_allclose(total / count, expected, rtol=1e-5)


def test_bad_requests_say_what_to_do():
    with pytest.raises(ValueError, match="a model whose tokens halt, as avit_"):
        losses.LOSSES["ponder"](Output(logits=jnp.zeros((2, 5))), {})
    one = jax.tree.map(lambda x: x[:1], _output((jnp.ones((2, 2)),)))
    with pytest.raises(ValueError, match="needs a batch of two"):
        losses.LOSSES["halting_prior"](one, {}, reference=True)
    with pytest.raises(ValueError, match="sites begin at 1"):
        dyntoken.create_model("avit_deit_tiny", at=(0, 3))
    with pytest.raises(ValueError, match="act_mode=4"):
        dyntoken.weights.official.build("NVlabs/A-ViT", "VisionTransformer", {"args": {"act_mode": 1}})
