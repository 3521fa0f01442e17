"""Paired timing: the arithmetic on known times, and both kinds of run."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken.analysis import timing


class Clock:
    """Stands in for the wall clock: programs move it by what they are said to last."""

    def __init__(self):
        self.now, self.log = 0.0, ""

    def program(self, name, seconds, drift=0.0):
        def run():
            self.log += name
            self.now += seconds * (1.0 + drift * self.now)
            return np.zeros(())

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_ratio_is_that_of_the_times(clock):
    timed = timing.compare(clock.program("a", 0.3), clock.program("b", 0.1), pairs=5, warmup=1, min_s=0.0)
    assert timed.ratios == pytest.approx([3.0] * 5)
    assert (timed.ratio, *timed.spread) == pytest.approx((3.0, 3.0, 3.0))
    assert timed.second.seconds == pytest.approx([0.1] * 5)
    assert timed.second.images_per_s(8) == pytest.approx(80.0)


def test_a_machine_that_slows_down_does_not_move_the_ratio(clock):
    timed = timing.compare(
        clock.program("a", 0.3, drift=0.05), clock.program("b", 0.1, drift=0.05), pairs=20, min_s=0.0
    )
    assert timed.first.seconds[-1] > 1.3 * timed.first.seconds[0]
    assert timed.ratio == pytest.approx(3.0, rel=0.01)


def test_every_other_pair_runs_in_reverse_order(clock):
    timing.compare(clock.program("a", 0.2), clock.program("b", 0.2), pairs=3, warmup=2, min_s=0.0)
    assert clock.log == "aabb" + "ab" + "ba" + "ab"


def test_short_programs_are_repeated(clock):
    timed = timing.compare(clock.program("a", 0.002), clock.program("b", 0.2), pairs=1, warmup=1, min_s=0.015)
    assert clock.log == "a" + "b" + "a" * 8 + "b"
    assert timed.first.latency == pytest.approx(0.002)


def test_statistics_of_known_numbers():
    times = timing.Times((0.1, 0.4, 0.2))
    timed = timing.Comparison(times, times, (1.0, 2.0, 3.0, 4.0, 5.0))
    assert (times.latency, times.images_per_s(10)) == (0.2, 50.0)
    assert (timed.ratio, timed.spread) == (3.0, (2.0, 4.0))


def test_no_pair_is_an_error():
    with pytest.raises(ValueError, match="pairs must be at least 1"):
        timing.compare(lambda: None, lambda: None, pairs=0)


SMALL = {"width": 24, "depth": 1, "heads": 2, "at": (0,), "keep": 0.5}


def test_runs_return_logits_and_gradients():
    model = dyntoken.create_model("dtps_vit_mini_patch4_28", dropout=0.1, **SMALL)
    variables = timing.random_variables(model)
    images = timing.random_images(model, 2)
    assert images.shape == (2, 28, 28, 1)
    logits = timing.evaluation(model, variables, images)()
    assert logits.shape == (2, 10) and bool(np.isfinite(logits).all())
    gradients = timing.training(model, variables, images)()
    shapes = jax.tree.map(lambda leaf: leaf.shape, variables["params"])
    assert jax.tree.map(lambda leaf: leaf.shape, gradients) == shapes
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))
    assert float(abs(gradients["backbone"]["patch_embed"]["conv_0"]["kernel"]).max()) > 0


def test_a_teacher_changes_the_gradients():
    model = dyntoken.create_model("etps_vit_mini_patch4_28", **SMALL)
    dense = dyntoken.create_model("vit_mini_patch4_28", **{k: SMALL[k] for k in ("width", "depth", "heads")})
    variables, images = timing.random_variables(model), timing.random_images(model, 2)
    plain = timing.training(model, variables, images)()
    taught = timing.training(
        model, variables, images, teacher=(dense, timing.random_variables(dense, seed=1))
    )()
    itself = timing.training(model, variables, images, teacher=(model, variables))()

    def apart(one):
        return max(float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (plain, one)), strict=True))

    assert apart(itself) < 1e-6 < 1e-4 < apart(taught)  # to agree with oneself asks for nothing


def test_random_variables_have_the_shapes_of_init():
    model = dyntoken.create_model("etps_vit_mini_patch4_28", **SMALL)
    variables = timing.random_variables(model, seed=1)
    wanted = jax.eval_shape(model.init, jax.random.key(0), timing.random_images(model, 1))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), wanted
    )
    again = timing.random_variables(model, seed=1)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), variables, again))


def test_exit_times_are_cumulative_seconds_per_image(monkeypatch):
    """Exit i is said to last i + 1 seconds; one slow call of five does not count."""
    model = dyntoken.create_model(
        "dvt_vit_mini", img_size=14, width=8, depth=1, heads=1, exits=(1, 2), relation_reuse=False
    )
    shapes, spans = [], iter([1.0, 1.0, 9.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0])

    def measure(run):
        logits, upstream = run()
        shapes.append((logits.shape, upstream.features is None))
        return next(spans)

    monkeypatch.setattr(timing, "measure", measure)
    images = timing.random_images(model, 4)
    times = timing.exit_times(model, timing.random_variables(model), images)
    np.testing.assert_allclose(times, [1 / 4, 3 / 4])
    assert shapes == [((4, 10), False)] * 5 + [((4, 10), True)] * 5


def test_exit_times_refuses_what_has_no_exits():
    with pytest.raises(ValueError, match="vit_mini_patch4_28 has no exits to time"):
        timing.exit_times(dyntoken.create_model("vit_mini_patch4_28"), {}, np.zeros((1, 28, 28, 1)))
