"""Adaptive token sampling: draws by hand, both forms, what the bound and the batch change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.types import Attended, Tokens

SMALL = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 5, "at": (0, 1)}
IMAGES = np.random.default_rng(5).normal(size=(4, 16, 16, 3)).astype(np.float32)


def _seen(scores):
    """Attention of the class token and values of length 2 that give these scores."""
    cls = jnp.asarray([scores], jnp.float32) / 2
    values = jnp.zeros((1, 2, 1 + len(scores), 2)).at[..., 0].set(2**0.5)
    return Attended(cls=cls, values=values)


def _draw(scores, keep, alive=None, **options):
    tokens = Tokens.start(jnp.arange(len(scores) + 1.0)[None, :, None])
    if alive is not None:
        tokens = tokens.replace(alive=jnp.asarray([alive], jnp.float32))
    reducer = dyntoken.make_reducer("ats", keep=keep, **options)
    return jax.jit(functools.partial(reducer.apply, {}))(tokens, _seen(scores))


def test_draws_by_hand():
    # Shares .1 .2 .3 .4, ascending; of the distribution 0, 2/9, 5/9, 1 the first is never drawn.
    tokens, r = _draw([0.3, 0.1, 0.4, 0.2], keep=4)
    np.testing.assert_allclose(r.scores, [[0.3, 0.1, 0.4, 0.2]], atol=1e-6)
    np.testing.assert_array_equal(r.keep, [[2, 0, 3, -1]])
    np.testing.assert_array_equal(r.decision, [[1, 0, 1, 1]])
    np.testing.assert_array_equal(tokens.x[0, :4, 0], [0, 3, 1, 4])
    np.testing.assert_array_equal(tokens.alive, [[1, 1, 1, 0]])
    np.testing.assert_array_equal(tokens.place, [[2, 0, 3, -1]])
    np.testing.assert_array_equal(tokens.carrier, [[1, -1, 0, 2]])
    # Points .01 .34 .67 1 among 0 .01 .02 1: the last row is drawn twice.
    _, r = _draw([0.01, 0.01, 0.97, 0.01], keep=4)
    np.testing.assert_array_equal(r.decision.sum(axis=1), [3])
    _, r = _draw([0.3, 0.1, 0.4, 0.2], keep=1)
    np.testing.assert_array_equal(r.keep, [[2]])


def test_what_is_gone_lets_the_lowest_row_be_drawn_unless_the_batch_is_compact():
    scores, alive = [0.3, 0.1, 0.4, 0.2], [1, 1, 1, 0]
    _, r = _draw(scores, 4, alive)
    np.testing.assert_array_equal(r.decision, [[1, 1, 1, 0]])
    _, r = _draw(scores, 4, alive, compact=True)
    np.testing.assert_array_equal(r.decision, [[1, 0, 1, 0]])
    assert np.isneginf(r.scores[0, 3])


@functools.cache
def _model(form="auto", **options):
    return dyntoken.create_model(
        "ats_deit_tiny_patch16_224", **{**SMALL, "keep": 0.6, "form": form, **options}
    )


@functools.cache
def _variables():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: _model().init(jax.random.key(0), IMAGES[:1]))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.3, s.shape), s.dtype), shapes)


def test_counts_differ_shapes_do_not_and_nobody_depends_on_the_batch():
    whole = _model("mask", keep=1.0)
    run = jax.jit(whole.apply)
    out = run(_variables(), IMAGES)
    counts = np.stack([r.decision.sum(axis=1) for r in out.reductions])
    assert (counts < 16).all() and (counts[1] <= counts[0]).all() and len(np.unique(counts)) > 1
    np.testing.assert_allclose(run(_variables(), IMAGES[::-1]).logits[::-1], out.logits, atol=1e-5)
    alone = jax.jit(whole.apply)(_variables(), IMAGES[:1])
    np.testing.assert_allclose(alone.logits, out.logits[:1], atol=1e-5)


def test_a_bound_is_what_the_gather_form_computes_with():
    out = jax.jit(lambda v, x: _model().apply(v, x, record=("blocks", "features")))(_variables(), IMAGES)
    assert [rows.shape[1] for rows in out.records["blocks"]] == [11, 7, 7] and out.tokens.count == 6
    assert (out.tokens.alive.sum(axis=1) == out.reductions[1].decision.sum(axis=1)).all()


def test_values_are_shown_where_rows_have_their_own():
    with pytest.raises(ValueError, match="their attention values, and no value there is that of one patch"):
        dyntoken.create_model("ats_pvt_tiny", at=(3,))
