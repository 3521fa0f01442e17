"""Training of a model with exits: the same on any number of devices, and after a crash."""

from __future__ import annotations

import functools
import itertools

import chex
import jax
import numpy as np
import pytest

from dyntoken import train
from dyntoken.eval.logits import classify
from dyntoken.train import sharding
from dyntoken.train.build import build
from tests.train.test_loop import CrashError, Log, assert_identical, crash, rows
from tests.train.tiny import DENSE, SMALL, tiny_config

MODEL = {"name": "dvt_deit_tiny", **SMALL, "exits": (1, 2), "context_width": 4, "context_hidden": 4}
NOISE = {"dropout": 0.1, "drop_path": 0.3, "drop_path_rule": "constant"}
CONFIG = tiny_config(
    model={**MODEL, **NOISE},
    losses={"ce": {"weights": (0.5, 1.0)}, "exit_kl": {"weight": 0.3, "temperature": 2.0}},
    # SGD: AdamW turns a gradient that is zero but for rounding into a whole step.
    optim={"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "clip": 1.0},
    ema=0.9,
    steps=4,
    checkpoint_steps=2,
)


@functools.cache
def trained(devices: int):
    """(state, metrics of two steps, evaluation) on the first devices."""
    run = build(CONFIG, devices=jax.devices()[:devices])
    state, history = run.new_state(), []
    for batch in itertools.islice(run.train_batches(0), 2):
        state, metrics = run.train_step(state, {}, sharding.place(batch, run.mesh))
        history.append(jax.device_get(metrics))
    found = classify(run.eval_step, state.ema, (sharding.place(b, run.mesh) for b in run.eval_batches()))
    return jax.device_get(state), history, found


@pytest.mark.thorough
def test_four_devices_do_what_one_does():
    (one, history_one, found_one), (four, history_four, found_four) = trained(1), trained(4)
    for a, b in zip(history_one, history_four, strict=True):
        assert set(a) == {
            "ce",
            "ce_per_exit",
            "exit_kl",
            "exit_kl_per_exit",
            "loss",
            "grad_norm",
            "update_norm",
        }
        chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(one.params, four.params, atol=1e-5, rtol=0)
    chex.assert_trees_all_close(one.ema, four.ema, atol=1e-5, rtol=0)
    assert found_one["count"] == found_four["count"] == 37
    assert found_one["top1_per_exit"] == pytest.approx(found_four["top1_per_exit"])


@pytest.mark.thorough
def test_the_loss_is_the_weighted_sum_over_losses_and_exits():
    for row in trained(4)[1]:
        means = {name: np.asarray(total) / count for name, (total, count) in row.items()}
        assert means["ce"] == pytest.approx(0.5 * means["ce_per_exit"][0] + means["ce_per_exit"][1], rel=1e-5)
        assert means["exit_kl"] == pytest.approx(means["exit_kl_per_exit"][0], rel=1e-5)
        assert means["loss"] == pytest.approx(means["ce"] + 0.3 * means["exit_kl"], rel=1e-5)


@pytest.mark.thorough
def test_crash_and_rerun_equal_no_crash(tmp_path):
    log = Log()
    straight = train.run(CONFIG, tmp_path / "straight", log=log)
    first = next(line for line in log if line.startswith("step 1/"))
    assert "/" in first.split("ce_per_exit ")[1]
    for name in ("top1_per_exit", "ema/top1_per_exit"):
        assert len(straight.metrics[name]) == 2
        assert straight.metrics[name][-1] == straight.metrics[name.removesuffix("_per_exit")]
    with pytest.raises(CrashError):
        train.run(CONFIG, tmp_path / "crashed", log=Log("step 3/4", crash))
    resumed = train.run(CONFIG, tmp_path / "crashed", log=Log())
    assert_identical(resumed.state, straight.state)
    assert resumed.metrics == straight.metrics
    assert rows(tmp_path / "crashed") == rows(tmp_path / "straight")
    again = train.run(CONFIG, tmp_path / "crashed", log=Log())  # read back from metrics.jsonl
    assert again.metrics == straight.metrics


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"losses__ce__weights": (1, 1, 1)}, r"loss 'ce' has 3 weights for 2 terms: give one for each exit"),
        ({"losses__token_distill": {}}, r"'token_distill' compares the final tokens of one network"),
        ({"losses__keep_ratio__weights": (1, 1)}, r"unknown option 'weights' of config.losses.keep_ratio"),
        (
            {"model": {"name": DENSE, **SMALL}, "losses__exit_kl": {}},
            r"'exit_kl' needs a model with at least",
        ),
        (
            {"model": {"name": DENSE, **SMALL}, "losses__ce__weights": (1,)},
            r"weights is for a model with exits",
        ),
        (
            {"losses__logit_kl": {}, "teacher": {**MODEL, "weights": "x"}},
            r"config.teacher.name is 'dvt_deit_tiny', which has exits: a teacher is one network",
        ),
    ],
)
def test_errors_say_what_to_do(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        train.run(tiny_config(**{"model": MODEL, **overrides}), tmp_path, log=Log())
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
