"""The runner: what it returns is what running every exit and then choosing returns."""

from __future__ import annotations

import contextlib
import functools

import jax
import numpy as np
import pytest

import dyntoken
from dyntoken.analysis import timing
from dyntoken.eval import exits
from dyntoken.eval.runner import Runner, ladder
from dyntoken.registry import UnknownNameError

TINY = {"img_size": 16, "width": 16, "depth": 2, "heads": 2, "num_classes": 5}
CASES = {
    "both": {"exits": (1, 2, 4)},
    "none": {"exits": (1, 2), "feature_reuse": False, "relation_reuse": False},  # gets uint8 images
}
BYTES = np.random.default_rng(3).integers(0, 256, (21, 16, 16, 3), np.uint8)


def prepare(images):
    return images.astype(np.float32) / 64 - 2


IMAGES = prepare(BYTES)
ALL = (exits.NEVER,) * 2 + (exits.ALWAYS,)


@functools.cache
def cascade(case):
    model = dyntoken.create_model("dvt_deit_tiny", **{**TINY, **CASES[case]})
    variables = timing.random_variables(model)
    # Larger weights than usual: scores must differ between images and between exits.
    return model, jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, variables)


@functools.cache
def all_exits(case):
    """Logits `[E, 21, K]` of every exit on every image."""
    model, variables = cascade(case)
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x).logits)(variables, IMAGES))


def between(scores, shares):
    """Thresholds in the middle of two scores, so that about these shares leave at each exit."""
    ranked = np.sort(scores, axis=1)
    cut = [round(len(row) * (1 - share)) for row, share in zip(ranked, shares, strict=True)]
    return [(row[i - 1] + row[i]) / 2 for row, i in zip(ranked, cut, strict=True)]


@functools.cache
def shared(case, batch, devices, rule="confidence", steps=2):
    """One runner per set-up: its programs are compiled once."""
    return fresh(case, batch, devices, rule, steps)


def fresh(case, batch, devices, rule="confidence", steps=2):
    limits = ALL[-len(CASES[case]["exits"]) :]
    more = {"prepare": prepare} if case == "none" else {}
    devices = jax.devices()[:devices]
    return Runner(
        *cascade(case), limits, rule=rule, batch=batch, steps=steps, devices=devices, seed=11, **more
    )


def batches(size, case="both"):
    images = BYTES if case == "none" else IMAGES
    return [images[start : start + size] for start in range(0, len(images), size)]


def check(results, case, thresholds, rule="confidence"):
    logits = all_exits(case)
    scores = exits.score(rule, logits, seed=11)
    taken = exits.exit_of(scores, thresholds)
    where = np.arange(len(IMAGES))
    np.testing.assert_array_equal(np.concatenate([r.exit for r in results]), taken)
    np.testing.assert_allclose(np.concatenate([r.logits for r in results]), logits[taken, where], atol=1e-5)
    np.testing.assert_allclose(np.concatenate([r.score for r in results]), scores[taken, where], atol=1e-5)
    assert results[0].logits.dtype == results[0].score.dtype == np.float32
    return np.bincount(taken, minlength=len(logits)).tolist()


SETUPS = [("both", 8, 1), ("both", 8, 4), ("none", 5, 1)]


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["calls", "stream"])
@pytest.mark.parametrize(("case", "batch", "devices"), SETUPS)
def test_the_runner_equals_all_exits_image_by_image(case, batch, devices, mode):
    """21 images: the last batch is short, of 5 rows or of 1."""
    runner = shared(case, batch, devices)
    count = len(runner.thresholds)
    runner.thresholds = limits = between(exits.score("confidence", all_exits(case)), [0.4, 0.3, 0.5][:count])
    given = batches(batch, case)
    results = [runner(b) for b in given] if mode == "calls" else [*runner.stream(given)]
    assert [len(r.exit) for r in results] == [len(b) for b in given]
    counts = check(results, case, limits)
    assert min(counts) > 0


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_everybody_at_one_exit(devices, leaving):
    runner = shared("both", 8, devices)
    runner.thresholds = limits = [exits.ALWAYS if i == leaving else exits.NEVER for i in range(3)]
    counts = [0, 0, 0]
    counts[leaving] = 21
    assert check([runner(b) for b in batches(8)], "both", limits) == counts
    assert check([*runner.stream(batches(8))], "both", limits) == counts


def test_random_draws_are_those_of_the_host():
    """Also where the images are on a device already."""
    runner = shared("none", 8, 4, "random", steps=1)
    given = [jax.device_put(images) for images in batches(8, "none")]
    runner.thresholds = limits = [0.6, 0.0]
    assert min(check([*runner.stream(given)], "none", limits, "random")) > 0
    calls = [runner(images, start=8 * i) for i, images in enumerate(given)]
    check(calls, "none", limits, "random")
    assert (runner(given[0], start=100).exit != calls[0].exit).any()


@pytest.mark.parametrize("rule", ["entropy", "margin"])
def test_other_rules_on_the_device(rule):
    logits = np.asarray(all_exits("both"))
    step = jax.jit(lambda x: exits.step_score(rule, x, exit_=0, numbers=np.arange(21)))
    np.testing.assert_allclose(step(logits[0]), exits.score(rule, logits)[0], atol=1e-6)


@contextlib.contextmanager
def used(runner):
    """Lists the programs that run, `(exit, rows per device)`."""
    log, real = [], runner._program
    runner._program = lambda index, rows: log.append((index, rows)) or real(index, rows)
    try:
        yield log
    finally:
        del runner._program


def test_streams_fill_late_exits_and_release_in_order():
    """4 rows per batch stay, so every second batch fills exit 1, and every fourth exit 2."""
    runner = shared("both", 8, 1)
    leave = [np.array([0, 2, 1, 0, 0, 1, 2, 0])] * 5
    with used(runner) as log:
        stream = runner.stream([IMAGES[:8]] * 5, leave=leave)
        first = next(stream)
        seen = list(log)
        rest = [*stream]
    # 8 rows of two batches fill exit 1; 2 of every batch, of four batches, fill exit 2.
    assert log[:7] == [(0, 8), (0, 8), (1, 8), (0, 8), (0, 8), (1, 8), (2, 8)]
    assert seen == log[:8] and log[7:] == [(0, 8), (1, 4), (2, 4)]
    for result in [first, *rest]:
        np.testing.assert_array_equal(result.exit, leave[0])
        expected = all_exits("both")[leave[0], np.arange(8)]
        np.testing.assert_allclose(result.logits, expected, atol=1e-5)
    assert len(rest) == 4


def test_calls_pad_to_the_smallest_bucket():
    runner = shared("both", 8, 4)
    with used(runner) as log:
        runner(IMAGES[:8], leave=[0, 0, 0, 0, 2, 2, 1, 0])
        runner(IMAGES[:8], leave=[0, 0, 0, 0, 0, 0, 0, 0])
        runner(IMAGES[:8], leave=[1, 0, 0, 0, 1, 0, 1, 0])
    # Rows per device: device 2 holds images 4 and 5, both of which go on.
    assert log == [(0, 2), (1, 2), (2, 2), (0, 2), (0, 2), (1, 1)]


def test_ladders():
    assert ladder(64, 8) == (8, 16, 24, 32, 40, 48, 56, 64)
    assert ladder(3, 8) == (1, 2, 3)
    assert ladder(20, 8) == (3, 5, 8, 10, 13, 15, 18, 20)
    assert ladder(7, 1) == (7,)


@contextlib.contextmanager
def compilations():
    """Counts what XLA is asked to compile."""
    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_precompile_leaves_nothing_to_compile():
    with compilations() as found:
        runner = fresh("none", 5, 1)
        assert (runner.buckets, runner.programs) == ((3, 5), 0)
        assert runner.precompile() == runner.programs == len(found) == 1 + 2
        for leave in ([0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]):
            assert runner(BYTES[:4], leave=leave).exit.tolist() == leave
        runner.thresholds = [0.3, 0.3]
        assert len([*runner.stream([BYTES[:5], BYTES[5:9]])]) == 2
        assert runner.precompile() == len(found) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"thresholds": [0.5, 0.5]}, r"3 exits need 3 thresholds, got shape \(2,\)"),
        ({"thresholds": [0.5, np.nan, 0.5]}, "threshold 1 is NaN"),
        ({"rule": "confidense"}, "unknown exit rule 'confidense': did you mean confidence"),
        ({"batch": 6}, "a batch of 6 does not divide over 4 devices"),
        ({"batch": 0}, "a batch of 0 does not divide"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"model": dyntoken.create_model("vit_mini_patch4_28")}, "vit_mini_patch4_28 has no exits"),
    ],
)
def test_one_clear_error_each(changed, message):
    model, variables = cascade("both")
    given = {"model": model, "variables": variables, "thresholds": ALL, "batch": 8} | changed
    with pytest.raises(ValueError, match=message) as error:
        Runner(**given)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, UnknownNameError) == ("rule" in changed)


@pytest.mark.parametrize(
    ("images", "leave", "message"),
    [
        (IMAGES[:2, :8], None, r"images must be \[b, 16, 16, 3\] for this model, got shape \(2, 8, 16, 3\)"),
        (IMAGES[0], None, "images must be"),
        (IMAGES[:9], None, "9 images do not fit a runner for batches of 1 to 8"),
        (IMAGES[:0], None, "0 images do not fit"),
        (IMAGES[:2], [0], "leave must be 2 integers, one per image"),
        (IMAGES[:2], [0, 3], "leave must name exits from 0 to 2"),
        (BYTES[:2], None, "uint8 images need a runner with prepare"),
    ],
)
def test_bad_batches_are_refused(images, leave, message):
    runner = shared("both", 8, 1)
    runner.thresholds = [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=message):
        runner(images, leave=leave)


def test_prepare_wants_bytes():
    with pytest.raises(ValueError, match="a runner with prepare takes uint8 images, got float32"):
        shared("none", 5, 1)(IMAGES[:2])


def test_a_row_may_not_spoil_its_neighbours_and_a_failed_run_not_the_next():
    """Rows of a failed run stay in the rings as padding: they must never count."""
    runner = shared("both", 8, 1)
    runner.thresholds = ALL
    with pytest.raises(ValueError, match="images must be"):
        [*runner.stream([np.full_like(IMAGES[:8], np.nan), IMAGES[:, :8]])]
    runner.thresholds = limits = between(exits.score("confidence", all_exits("both")), [0.7, 0.5, 0.5])
    check([runner(b) for b in batches(8)], "both", limits)
