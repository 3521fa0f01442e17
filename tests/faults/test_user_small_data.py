"""Small data: a weight average that forgets its start, and rates that fall at any batch size."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken import config as recipes
from dyntoken import optim, schedules, train
from tests.train.tiny import tiny_config

RECIPES = [
    "deit",
    "deit:size=b,pixels=384",
    "deit:inat",
    "dvt_cifar",
    "dvt_deit",
    "dvt_t2t",
    "dynamicvit_convnext",
    "dynamicvit_deit",
    "dynamicvit_lvvit",
    "dynamicvit_swin",
    "evit_deit",
    "evit_deit:scratch",
    "lvvit",
    "multiexit_deit",
    "tps_cvt",
    "tps_deit",
    "tps_deit:cifar10",
    "tps_lvvit",
    "tps_psvit",
    "tps_pvt",
]


def averaged(steps, decay, warmup):
    """Share of the start in the average: weights 0 from a start of 1."""
    average = jnp.ones(())
    for step in range(steps):
        average = optim.ema(average, jnp.zeros(()), decay, jnp.int32(step) if warmup else None)
    return float(average)


def test_the_decay_warms_up():
    kept = [float(schedules.ema_decay(step, 0.9)[0]) for step in (0, 10, 50, 80, 81, 1000)]
    np.testing.assert_allclose(kept, [0.1, 0.55, 51 / 60, 0.9, 0.9, 0.9], rtol=1e-6)
    kept, taken = schedules.ema_decay(jnp.int32(10**6), 0.99996)
    np.testing.assert_allclose([kept, taken], [0.99996, 4e-5], rtol=1e-6)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize(("steps", "decay"), [(1, 0.9), (30, 0.9), (120, 0.9), (40, 0.99996)])
def test_the_share_of_the_start_is_what_the_average_holds(steps, decay, warmup):
    found = schedules.ema_start(steps, decay, warmup=warmup)
    assert found == pytest.approx(averaged(steps, decay, warmup), rel=1e-4, abs=1e-12)


def test_the_figures_of_the_report():
    for steps, share in ((60, 0.998), (930, 0.964), (7500, 0.741)):
        assert schedules.ema_start(steps, 0.99996, warmup=False) == pytest.approx(share, abs=6e-4)
        assert schedules.ema_start(steps, 0.99996, warmup=True) < 1e-6
    assert "74 %" in schedules.ema_warning(7500, 0.99996, warmup=False)
    assert schedules.ema_warning(7500, 0.99996, warmup=True) is None
    assert schedules.ema_warning(7500, 0.0, warmup=False) is None


@pytest.mark.thorough
def test_a_run_warms_its_average_up_and_resumes_exactly(tmp_path):
    config = tiny_config(ema=0.99996, steps=4, optim__schedule="constant")
    whole = train.run(config, tmp_path / "whole", log=lambda line: None)
    config.steps = 2
    train.run(config, tmp_path / "parts", log=lambda line: None)
    config.steps = 4
    parts = train.run(config, tmp_path / "parts", log=lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, whole.state.ema, parts.state.ema)
    average, weights = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(t)])
        for t in (whole.state.ema, whole.state.variables)
    )
    start = np.concatenate([x.ravel() for x in jax.tree.leaves(whole.run.new_state().variables)])
    assert np.abs(average - weights).max() < 0.6 * np.abs(start - weights).max()


def test_an_average_that_is_mostly_the_start_is_said(tmp_path):
    lines = []
    config = tiny_config(ema=0.9999, ema_warmup=False, steps=2, optim__lr=1e-4)
    train.run(config, tmp_path, log=lines.append)
    assert any("100 % the start" in line for line in lines)
    assert any("little will be learnt" in line for line in lines[:3])
    lines.clear()
    train.evaluate(config, tmp_path, log=lines.append)
    assert any("prefer='params'" in line for line in lines)


def test_a_run_too_short_to_learn_is_said():
    short = {"epochs": 5.0, "steps": 0, "optim__lr": 1.6e-5, "optim__warmup_epochs": 1.25}  # 4 steps an epoch
    words = train.build(tiny_config(**short)).warning
    assert words.startswith(
        "20 steps, 5 of them warm-up, rate at most 1.6e-05: little will be learnt (no weight"
    )
    assert "\n" not in words
    assert train.build(tiny_config(**short, optim__name="sgd")).warning is None  # moves by the gradient
    given = {"min_lr": 0.0, "warmup_lr": 0.0, "warmup_epochs": 0, "warmup_steps": None, "steps_per_epoch": 4}
    for kind in ("cosine", "cosine_epoch", "cosine_epoch_start", "constant"):
        for lr, steps, enough in ((1e-3, 20, True), (1e-5, 20, False), (1e-5, 2000, True)):
            rate = schedules.learning_rate(kind, lr=lr, total_steps=steps, **given)
            assert (schedules.step_warning(rate, steps, 0) is None) == enough


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_rate_of_a_recipe_rises_at_a_small_batch(recipe):
    """`decay` runs down to `min_lr`; the warm-up rises to `lr`."""
    name, _, arg = recipe.partition(":")
    c = recipes.load(f"configs/{name}.py:{arg}")
    official = c.optim.to_dict()
    for batch in (c.batch, 32, 8):
        c.batch = batch
        keys = ("schedule", "lr", "min_lr", "warmup_lr", "warmup_epochs", "warmup_steps", "cooldown_epochs")
        given = {"warmup_lr": 0.0, "warmup_epochs": 0, "warmup_steps": None, "cooldown_epochs": 0}
        given |= {key: c.optim[key] for key in keys if key in c.optim}
        total = round(c.epochs) * 10
        rate = schedules.learning_rate(given.pop("schedule"), **given, total_steps=total, steps_per_epoch=10)
        rates = [rate(step) for step in range(0, total, 10)]
        peak = int(np.argmax(rates))
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(rates[peak:]))
        assert max(rates) <= c.optim.lr * (1 + 1e-6)
    assert all(
        official[key] == pytest.approx(recipes.load(f"configs/{name}.py:{arg}").optim[key])
        for key in ("lr", "min_lr")
    )


def test_the_floors_of_tps_follow_the_batch():
    c = recipes.load("configs/tps_deit.py")
    assert (c.optim.min_lr, c.optim.warmup_lr) == (pytest.approx(1e-5), pytest.approx(1e-6))
    c.batch = 32
    assert c.optim.min_lr == pytest.approx(1e-5 / 32) and c.optim.warmup_lr == pytest.approx(1e-6 / 32)


@pytest.mark.parametrize(
    ("given", "named"),
    [({"min_lr": 1e-3}, "min_lr"), ({"warmup_lr": 2e-4, "warmup_epochs": 1}, "warmup_lr")],
)
def test_a_rate_that_would_rise_is_refused(given, named):
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=rf"{named}=.*lr=0\.0001") as error:
        optim.make(params, total_steps=10, steps_per_epoch=5, lr=1e-4, **given)
    assert "\n" not in str(error.value)


def test_rates_that_nothing_reads_are_not_refused():
    params = {"kernel": jnp.ones((2, 2))}
    optim.make(params, total_steps=10, steps_per_epoch=5, lr=1e-4, warmup_lr=1.0)
    optim.make(params, total_steps=10, steps_per_epoch=5, lr=1e-4, min_lr=1.0, schedule="constant")
    optim.make(params, total_steps=10, steps_per_epoch=5, lr=1e-4, min_lr=1e-4)
