"""The early-exit runner on images that are no images, and on devices that are none."""

import jax
import numpy as np
import pytest

from dyntoken.eval.runner import Runner
from dyntoken.train import sharding as mesh
from tests.eval.test_runner import ALL, IMAGES, all_exits, between, cascade, exits, shared


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["call", "stream"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_image_is_marked_and_the_rest_goes_on(value, mode):
    runner = shared("both", 8, 1)
    runner.thresholds = limits = between(exits.score("confidence", all_exits("both")), [0.4, 0.3, 0.5])
    images = np.array(IMAGES)
    images[3], images[10, 0, 0, 0] = value, value
    given = [images[:8], images[8:16], images[16:]]
    found = [runner(b) for b in given] if mode == "call" else [*runner.stream(given)]
    exit_, score, logits = (
        np.concatenate([getattr(r, n) for r in found]) for n in ("exit", "score", "logits")
    )
    bad = np.isin(np.arange(21), [3, 10])
    taken = exits.exit_of(exits.score("confidence", all_exits("both")), limits)
    np.testing.assert_array_equal(exit_, np.where(bad, -1, taken))
    np.testing.assert_array_equal(np.isnan(score), bad)
    expected = all_exits("both")[taken, np.arange(21)]
    np.testing.assert_allclose(logits[~bad], expected[~bad], atol=1e-5)


@pytest.mark.thorough
def test_the_random_rule_marks_it_too():
    """Its draws ignore the logits: a score alone would not tell."""
    runner = shared("both", 8, 1, "random", steps=1)
    runner.thresholds = ALL
    images = np.array(IMAGES[:4])
    images[2] = np.nan
    found = runner(images)
    assert found.exit.tolist() == [2, 2, -1, 2] and np.isnan(found.score).tolist() == [0, 0, 1, 0]


def test_a_forced_exit_of_a_bad_image_is_marked():
    runner = shared("both", 8, 1)
    images = np.array(IMAGES[:2])
    images[0] = np.nan
    assert runner(images, leave=[0, 1]).exit.tolist() == [-1, 1]


@pytest.mark.parametrize("devices", [[], (), [jax.devices()[0]] * 2])
def test_devices_that_are_none_or_twice_the_same(devices):
    with pytest.raises(ValueError, match="devices=") as error:
        Runner(*cascade("both"), ALL, batch=8, devices=devices)
    assert "\n" not in str(error.value)


def test_a_training_mesh_of_no_devices():
    with pytest.raises(ValueError, match="devices="):
        mesh.data_mesh([])
