"""What the backward pass computes again, by policy; the gradient is that of no recomputation."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

import dyntoken
from dyntoken.nn.remat import POLICIES
from dyntoken.ops import backend

IMAGES = jnp.linspace(-1, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
DEPTH = 2


def _grad(remat, scan=False):
    model = dyntoken.create_model(
        "deit_tiny_patch4_8", width=8, heads=2, depth=DEPTH, drop_path=0.3, remat=remat, scan=scan
    )

    def loss(variables):
        rngs = {"dropout": jax.random.key(1)}
        return (model.apply(variables, IMAGES, train=True, rngs=rngs).logits ** 2).sum()

    return jax.grad(loss), jax.eval_shape(model.init, jax.random.key(0), IMAGES)


def _products(remat):
    """Matrix products in forward and backward pass, of which a block's forward has six."""
    with backend.trace_for("tpu"):
        grad, variables = _grad(remat)
        return str(jax.make_jaxpr(grad)(variables)).count("dot_general[")


def test_policies_recompute_what_they_say():
    none = _products(False)
    assert none == _products("everything_saveable") == _products("dots_saveable")
    # The last product of a half feeds only the residual sum: nothing needs it again.
    attention = _products("dots_with_no_batch_dims_saveable") - none
    everything = _products(True) - none
    assert _products("nothing_saveable") - none == everything
    assert 0 < attention < everything
    assert attention % DEPTH == everything % DEPTH == 0


@pytest.mark.thorough
def test_memory_falls_on_a_cpu_too():
    """There a compiler merges what is computed again with what was before; only in a loop it cannot."""

    def planned(remat, **options):
        model = dyntoken.create_model("dtps_deit_tiny_patch4_32", width=32, heads=2, remat=remat, **options)
        images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
        rngs = {"policy": jax.random.key(1)}
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        loss = jax.grad(lambda v, x: model.apply(v, x, train=True, rngs=rngs).logits.sum())
        return jax.jit(loss).lower(variables, images).compile().memory_analysis().temp_size_in_bytes

    kept = planned(False)
    assert planned(True) < 0.7 * kept
    assert planned("everything_saveable") < 1.3 * kept


@pytest.mark.slow
@pytest.mark.parametrize("remat", [True, *POLICIES])
@pytest.mark.parametrize("scan", [False, True])
def test_the_gradient_is_the_same(remat, scan):
    grad, _ = _grad(remat, scan)
    chex.assert_trees_all_close(jax.jit(grad)(_variables()), _expected(), rtol=1e-4, atol=1e-5)


@functools.cache
def _variables():
    shapes = _grad(False)[1]
    keys = iter(jax.random.split(jax.random.key(3), 100))
    return jax.tree.map(lambda s: 0.3 * jax.random.normal(next(keys), s.shape) + (s.ndim == 1), shapes)


@functools.cache
def _expected():
    return jax.jit(_grad(False)[0])(_variables())


def test_unknown_policy_names_those_there_are():
    with pytest.raises(ValueError, match=r"remat is 'dot_saveable': give True or False, or .*dots_saveable"):
        _grad("dot_saveable")
    with pytest.raises(ValueError, match=r"remat is 1: give .*dots_saveable"):
        _grad(1)
