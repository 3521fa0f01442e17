"""Ranking tokens whose scores are no ordinary numbers: one order on every platform."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.ops import backend, select

NAN, INF = float("nan"), float("inf")
ODD = st.sampled_from([NAN, -NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1.5])
SCORES = st.lists(st.one_of(ODD, st.floats(width=32, allow_subnormal=False)), min_size=1, max_size=12)


ORDERS = {platform: jax.jit(lambda scores: select.order(scores)) for platform in ("cpu", "gpu", "tpu")}
SPLIT = jax.jit(select.split, static_argnums=1)


def ranked(scores):
    """NaN, then from the largest to the smallest; of equal ones the first."""
    first = [i for i, s in enumerate(scores) if s != s]
    return first + sorted((i for i, s in enumerate(scores) if s == s), key=lambda i: (-scores[i], i))


@hypothesis.given(SCORES)
@hypothesis.settings(deadline=None)
def test_every_form_ranks_alike(scores):
    for platform, order in ORDERS.items():
        with backend.trace_for(platform):
            found = np.asarray(order(np.array([scores], np.float32))[0])
        np.testing.assert_array_equal(found, ranked(scores), err_msg=platform)


@hypothesis.given(SCORES, st.data())
@hypothesis.settings(deadline=None)
def test_a_split_loses_no_row_and_takes_none_twice(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    with backend.trace_for("tpu"):
        kept, dropped = jax.device_get(SPLIT(np.array([scores], np.float32), keep))
    assert [*kept[0].tolist(), *dropped[0].tolist()] == ranked(scores)


def test_the_row_numbers_of_the_report():
    scores = jnp.array([[1.0, 3.0, 2.0, 0.5, 0.2, 2.5, NAN, NAN, 0.1]])
    with backend.trace_for("tpu"):
        np.testing.assert_array_equal(select.order(scores)[0], [6, 7, 1, 5, 2, 0, 3, 4, 8])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_scores_of_other_types(dtype):
    scores = jnp.array([[1, 2, 0, 2]], dtype)
    with backend.trace_for("tpu"):
        np.testing.assert_array_equal(jax.jit(select.order)(scores)[0], [1, 3, 0, 2])


def test_an_image_of_nan_leaves_the_others_of_its_batch_alone():
    """Also where the kept rows are counted by comparison."""
    small = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 3}
    model = dyntoken.create_model("etps_deit_tiny", **small, at=(1,), keep=0.5)
    images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    with backend.trace_for("tpu"):
        run = jax.jit(lambda v, x: model.apply(v, x))
        good, bad = run(variables, images), run(variables, images.at[1].set(NAN))
    np.testing.assert_array_equal(bad.logits[::2], good.logits[::2])
    assert np.isnan(bad.logits[1]).all()
    assert sorted(bad.reductions[0].keep[1].tolist()) == list(range(8))  # NaN alike: the first rows stay
