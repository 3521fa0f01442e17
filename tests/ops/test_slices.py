"""Batches in slices: how they are cut, and that a model's answer is that of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.analysis import timing
from dyntoken.ops import backend, slices
from dyntoken.reducers import METHODS

SMALL = {"width": 24, "depth": 2, "heads": 2}


@pytest.mark.parametrize(
    ("batch", "wanted", "got"),
    [(16, 4, 4), (64, 8, 8), (6, 4, 3), (10, 4, 2), (7, 4, 0), (4, 4, 0), (1, 1, 0), (5, 1, 1), (12, 0, 0)],
)
def test_a_slice_divides_the_batch(batch, wanted, got):
    with slices.of(wanted):
        assert slices.size((batch, 32, 32, 3)) == got


def test_slices_are_those_of_pixels_and_cores_and_of_a_cpu_alone(monkeypatch):
    monkeypatch.setattr(slices, "_cores", lambda: 2)
    assert slices.size((64, 224, 224, 3)) == 2 * slices.PIXELS // 224**2
    assert slices.size((64, 448, 448, 3)) == max(1, 2 * slices.PIXELS // 448**2)
    with backend.trace_for("tpu"):
        assert slices.size((64, 224, 224, 3)) == 0
    (symbol,) = jax.export.symbolic_shape("b")
    assert slices.size((symbol, 224, 224, 3)) == 0


def built(name, **more):
    model = dyntoken.create_model(name, **{**SMALL, **more})
    variables = timing.random_variables(model)
    return model, variables, timing.random_images(model, 6)


def shapes(model, variables, images, size):
    with slices.of(size):
        run = functools.partial(model.apply)  # fresh: nothing is traced yet
        return jax.eval_shape(run, variables, images)


DEFAULT = ("dtps", "evit", "avit", "diffrate")  # of each kind one; the others are slow for their number
EVERY = [m if m in DEFAULT else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]


@pytest.mark.parametrize("method", EVERY)
def test_every_method_returns_the_same_record(method):
    model, variables, images = built(f"{method}_vit_mini_patch4_28", depth=4)
    whole, cut = (shapes(model, variables, images, size) for size in (0, 2))
    assert jax.tree.structure(whole) == jax.tree.structure(cut)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), whole) == jax.tree.map(
        lambda x: (x.shape, x.dtype), cut
    )


@pytest.mark.parametrize("name", ["vit_mini_patch4_28", "dtps_vit_mini_patch4_28"])
def test_the_answer_is_that_of_the_whole_batch(name):
    model, variables, images = built(name, **({"keep": 0.5, "at": (1,)} if "dtps" in name else {}))
    found = []
    for size in (0, 2):
        with slices.of(size):
            found.append(jax.jit(lambda v, x: model.apply(v, x))(variables, images))
    whole, cut = found
    np.testing.assert_allclose(cut.logits, whole.logits, rtol=0, atol=1e-5)
    for one, other in zip(whole.reductions, cut.reductions, strict=True):
        np.testing.assert_allclose(other.scores, one.scores, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(other.keep.sum(axis=1), one.keep.sum(axis=1))  # equal scores may swap


def test_loops_are_of_plain_evaluations_alone():
    model, variables, images = built("dtps_vit_mini_patch4_28", at=(1,))

    def loops(**options):
        with slices.of(2):
            run = functools.partial(model.apply, **options)
            return "scan" in str(jax.make_jaxpr(run)(variables, images))

    assert loops() and not loops(record=("features",)) and not loops(rngs={"policy": jax.random.key(0)})
    assert not loops(decisions=(jnp.ones((6, 49)),)) and not loops(mutable=["intermediates"])
    assert not loops(train=True, rngs={"policy": jax.random.key(0), "dropout": jax.random.key(1)})
