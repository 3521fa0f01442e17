import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.nn.dual_path import Route, Streams, branch
from dyntoken.ops import backend
from dyntoken.types import Reduction

MASK = jnp.array([[1.0, 0.0, 1.0, 0.0]])
CELLS = jnp.arange(1.0, 5.0).reshape(1, 4, 1)


def _reduction(keep):
    empty = jnp.zeros((1, 4))
    return Reduction(scores=empty, decision=MASK, place=empty, host=empty, remap=empty, count=keep)


def test_streams_by_hand():
    streams = Streams(CELLS, 10 * CELLS)
    np.testing.assert_array_equal(streams.mixed(MASK)[0, :, 0], [1, 20, 3, 40])
    new = streams.renewed(100 * CELLS, MASK)  # a cell's own path gets the new value, the other keeps its own
    np.testing.assert_array_equal(new.slow[0, :, 0], [100, 2, 300, 4])
    np.testing.assert_array_equal(new.fast[0, :, 0], [10, 200, 30, 400])


def test_streams_carry_the_gradient_of_the_decision():
    grad = jax.grad(lambda mask: Streams(CELLS, 10 * CELLS).mixed(mask).sum())(MASK)
    np.testing.assert_array_equal(grad, [[-9, -18, -27, -36]])  # slow minus fast


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_each_path_runs_on_its_own_cells(platform):
    seen = {}

    def path(name, factor):
        def run(x):
            seen[name] = x.shape[1]
            return factor * x

        return run

    with backend.trace_for(platform):
        for form, counts in (("gather", {"slow": 2, "fast": 2}), ("mask", {"slow": 4, "fast": 4})):
            route = Route.of(_reduction(2), form, train=False)
            y = branch(route, CELLS, path("slow", 2.0), path("fast", -1.0))
            np.testing.assert_array_equal(y[0, :, 0], [2, -2, 6, -4])
            assert seen == counts


def test_only_training_in_mask_form_carries_streams():
    assert Route.of(_reduction(2), "mask", train=True).streams
    assert not Route.of(_reduction(2), "mask", train=False).streams
    assert not Route.of(_reduction(2), "gather", train=True).streams
