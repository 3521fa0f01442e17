"""Schedules, parameter groups and updates against hand-computed numbers."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dyntoken import optim
from dyntoken.schedules import learning_rate

CONSTANT = {"total_steps": 10, "steps_per_epoch": 1, "schedule": "constant", "lr": 0.1}


def schedule(kind, **changes):
    given = {"lr": 1e-3, "min_lr": 1e-6, "warmup_lr": 0.0, "warmup_epochs": 5, "warmup_steps": None}
    return learning_rate(kind, **{**given, "total_steps": 120, "steps_per_epoch": 4, **changes})


def train(params, grads, **options):
    """Parameters after each gradient of a list, and the last state."""
    tx, _ = optim.make(params, **{**CONSTANT, **options})
    state, history = tx.init(params), []
    for grad in grads:
        updates, state = jax.jit(tx.update)(grad, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        history.append(params)
    return history, state


def weight(value):
    return {"kernel": jnp.full((1, 1), value, jnp.float32)}


def values(history):
    return [float(params["kernel"][0, 0]) for params in history]


def part(state, name):
    """What a part of the optimizer's state holds of the parameters, by the name of its field."""
    return optax.tree.get(state, name)


def counts(state):
    """How many updates each part of the state has counted."""
    return {int(count) for _, count in optax.tree.get_all_with_path(state, "count")}


def tree():
    """The shape of a small model, with one leaf of each sort."""
    leaf = jax.ShapeDtypeStruct
    dense = {"kernel": leaf((4, 4), jnp.float32), "bias": leaf((4,), jnp.float32)}
    return {
        "backbone": {
            "cls_token": leaf((1, 1, 4), jnp.float32),
            "pos_embed": leaf((1, 5, 4), jnp.float32),
            "trunk": {
                "blocks_0": {"norm1": {"scale": leaf((4,), jnp.float32)}, "attn": {"qkv": dense}},
                "reducer_0": {"predictor": {"in_conv_1": dense}},
            },
        },
        "head": {"cls": dense},
    }


def test_cosine_per_step():
    rate = schedule("cosine")
    assert rate(0) == 0.0
    assert rate(1) == pytest.approx(5.2631578947368424e-05, rel=1e-14)
    assert rate(19) == rate(20) == 1e-3  # the warm-up includes both ends
    assert rate(21) == pytest.approx(0.0009997535269026829, rel=1e-14)
    assert rate(70) == pytest.approx(0.0005005, rel=1e-14)
    assert rate(119) == pytest.approx(1.2464730973170658e-06, rel=1e-12)
    assert rate(120) == rate(1000) == 1e-6
    assert schedule("cosine", warmup_steps=2)(1) == 1e-3
    assert schedule("cosine", warmup_epochs=0)(0) == 1e-3
    json.dumps(rate(7))


def test_cosine_per_epoch_runs_one_epoch_late():
    rate = schedule("cosine_epoch", lr=2.5e-4, min_lr=1e-5, warmup_lr=1e-6)
    by_epoch = [rate(4 * epoch) for epoch in range(30)]
    assert by_epoch[:3] == [1e-6, 1e-6, pytest.approx(5.08e-5, rel=1e-14)]
    assert by_epoch[6] == pytest.approx(0.00023392304845413266, rel=1e-14)
    assert by_epoch[29] == pytest.approx(1.2622287911943319e-05, rel=1e-12)
    assert rate(27) == by_epoch[6]
    assert rate(4 * 31) == 1e-5
    plain = schedule("cosine_epoch", warmup_epochs=0)
    assert plain(0) == plain(7) == 1e-3 and plain(8) < 1e-3


def test_cosine_at_the_start_of_an_epoch_with_cool_down():
    """timm's CosineLRScheduler(t_initial=20, warmup_t=5) as its train.py steps it, then 10 epochs at min_lr."""
    rate = schedule("cosine_epoch_start", warmup_lr=1e-6, min_lr=1e-5, lr=2e-3, cooldown_epochs=10)
    by_epoch = [rate(4 * epoch + 3) for epoch in range(30)]
    assert by_epoch[:2] == [1e-6, pytest.approx(1e-6 + 1.999e-3 / 5, rel=1e-14)]
    assert by_epoch[5] == pytest.approx(1e-5 + 1.99e-3 * (1 + np.sqrt(0.5)) / 2, rel=1e-12)  # cos(pi / 4)
    assert by_epoch[10] == pytest.approx(1.005e-3, rel=1e-12)
    assert by_epoch[19] > 1e-5 and by_epoch[20:] == [1e-5] * 10
    steps = schedule("cosine", cooldown_epochs=10)
    assert steps(79) > 1e-6 and steps(80) == steps(119) == 1e-6
    assert (
        schedule("cosine_epoch", cooldown_epochs=10)(84)
        == 1e-6
        < schedule("cosine_epoch", cooldown_epochs=10)(80)
    )


def test_constant_after_warm_up():
    rate = schedule("constant", warmup_epochs=0.5)
    assert [rate(step) for step in (0, 1, 2, 200)] == [0.0, 1e-3, 1e-3, 1e-3]


@pytest.mark.parametrize("kind", ["cosine", "cosine_epoch", "cosine_epoch_start", "constant"])
def test_schedule_under_jit(kind):
    rate = schedule(kind, warmup_lr=1e-6)
    steps = np.arange(130, dtype=np.int32)
    np.testing.assert_allclose(jax.jit(jax.vmap(rate))(steps), rate(steps), rtol=1e-6)


def test_schedule_errors():
    with pytest.raises(ValueError, match="unknown schedule 'cosin': did you mean cosine"):
        schedule("cosin")
    with pytest.raises(ValueError, match="warm-up of 120 steps does not fit into a run of 120"):
        schedule("cosine", warmup_epochs=30)
    with pytest.raises(ValueError, match="at least 1"):
        schedule("cosine", total_steps=0)
    with pytest.raises(ValueError, match="cool-down of 120 steps does not fit into a cosine schedule of 120"):
        schedule("cosine", cooldown_epochs=30)
    with pytest.raises(ValueError, match="cool-down of 4 steps does not fit into a constant schedule"):
        schedule("constant", cooldown_epochs=1)
    with pytest.raises(ValueError, match="warm-up of 40 steps does not fit into a run of 40"):
        schedule("cosine", warmup_epochs=10, cooldown_epochs=20)


def test_groups_follow_dynamicvit():
    found = optim.groups(
        tree(),
        backbone_lr_scale=0.01,
        backbone_freeze_epochs=5,
        steps_per_epoch=100,
        frozen=("cls_token", "pos_embed"),
    )
    block, predictor = "backbone/trunk/blocks_0", "backbone/trunk/reducer_0/predictor/in_conv_1"
    assert found == {
        "backbone/cls_token": optim.Group("frozen", 0.0, 0.0, 0),
        "backbone/pos_embed": optim.Group("frozen", 0.0, 0.0, 0),
        f"{block}/attn/qkv/bias": optim.Group("no_decay", 0.0, 0.01, 500),
        f"{block}/attn/qkv/kernel": optim.Group("decay", 0.05, 0.01, 500),
        f"{block}/norm1/scale": optim.Group("no_decay", 0.0, 0.01, 500),
        f"{predictor}/bias": optim.Group("new_param_no_decay", 0.0, 1.0, 0),
        f"{predictor}/kernel": optim.Group("new_param", 0.05, 1.0, 0),
        "head/cls/bias": optim.Group("no_decay", 0.0, 0.01, 500),
        "head/cls/kernel": optim.Group("decay", 0.05, 0.01, 500),
    }


def test_other_decay_rules():
    every = optim.groups(tree(), decay="all")
    assert {group.weight_decay for group in every.values()} == {0.05}
    timm = optim.groups(tree())
    assert timm["backbone/pos_embed"].name == timm["backbone/cls_token"].name == "no_decay"
    assert optim.groups(tree(), no_decay=())["backbone/pos_embed"].name == "decay"


def test_one_pattern_may_be_a_plain_string():
    found = optim.groups(tree(), frozen="pos_embed")
    assert [path for path, group in found.items() if group.name == "frozen"] == ["backbone/pos_embed"]


def test_adamw_literal():
    # step 1: m = 0.05 / 0.1, v = 0.00025 / 0.001, direction 1, decay 0.1 * 1
    # step 2: m = -0.055 / 0.19, v = 0.00124975 / 0.001999, direction -0.3661035, decay 0.1 * 0.89
    history, state = train(weight(1.0), [weight(0.5), weight(-1.0)], weight_decay=0.1)
    assert values(history) == pytest.approx([0.89, 0.9177104], abs=1e-6)
    assert counts(state) == {2}
    assert float(part(state, "mu")["kernel"][0, 0]) == pytest.approx(-0.055)
    # eps is added outside the root: 0.5 / (0.5 + 1)
    history, _ = train(weight(1.0), [weight(0.5)], weight_decay=0.0, eps=1.0)
    assert values(history) == pytest.approx([1 - 0.1 / 3], abs=1e-6)


def test_sgd_literal():
    grads = [weight(0.5), weight(0.5)]
    history, state = train(weight(1.0), grads, name="sgd", weight_decay=0.1)
    assert values(history) == pytest.approx([0.94, 0.8266], abs=1e-6)
    assert counts(state) == {2} and part(state, "mu") is None
    assert float(part(state, "trace")["kernel"][0, 0]) == pytest.approx(0.9 * 0.6 + 0.594, rel=1e-6)
    history, _ = train(weight(1.0), grads[:1], name="sgd", weight_decay=0.1, nesterov=True)
    assert values(history) == pytest.approx([0.886], abs=1e-6)


def test_clip_by_the_global_norm():
    params = {"a": jnp.zeros((1, 1)), "b": jnp.zeros((1, 1))}
    grads = {"a": jnp.full((1, 1), 3.0), "b": jnp.full((1, 1), 4.0)}
    options = {"name": "sgd", "lr": 1.0, "weight_decay": 0.0}
    (after,), _ = train(params, [grads], clip=2.5, **options)
    assert [float(after[k][0, 0]) for k in "ab"] == pytest.approx([-1.5, -2.0], rel=1e-6)
    (after,), _ = train(params, [grads], clip=6.0, **options)
    assert [float(after[k][0, 0]) for k in "ab"] == [-3.0, -4.0]
    (after,), _ = train(params, [params], clip=1.0, **options)
    assert [float(after[k][0, 0]) for k in "ab"] == [0.0, 0.0]


def test_frozen_backbone_gathers_moments_then_moves_slowly():
    params = {"trunk": weight(1.0), "reducer_0": weight(1.0), "pos_embed": jnp.ones((1, 1, 1))}
    grads = [jax.tree.map(jnp.ones_like, params)] * 3
    history, state = train(
        params,
        grads,
        weight_decay=0.0,
        backbone_lr_scale=0.01,
        backbone_freeze_epochs=2,
        frozen=("pos_embed",),
    )
    moved = [[float(h[k]["kernel"][0, 0]) for k in ("trunk", "reducer_0")] for h in history]
    # a constant gradient has direction 1 at every step, if the moments saw all of them
    np.testing.assert_allclose(moved, [[1.0, 0.9], [1.0, 0.8], [0.999, 0.7]], atol=1e-5)
    assert float(history[-1]["pos_embed"][0, 0, 0]) == 1.0
    assert float(part(state, "mu")["trunk"]["kernel"][0, 0]) == pytest.approx(1 - 0.9**3, rel=1e-6)


def test_backbone_and_head_end_at_one_rate():
    """torch's CosineAnnealingLR(eta_min=2e-4) over groups at 0.05 and 0.01 x 0.05."""
    params = {"trunk": weight(0.0), "head": weight(0.0)}
    history, _ = train(
        params,
        [jax.tree.map(jnp.ones_like, params)] * 3,
        name="sgd",
        momentum=0.0,
        weight_decay=0.0,
        lr=0.05,
        min_lr=2e-4,
        schedule="cosine_epoch_start",
        total_steps=2,
        new_params=("head",),
        backbone_lr_scale=0.01,
        backbone_min_lr=2e-4,
    )
    found = [[-float(h[k]["kernel"][0, 0]) for h in history] for k in ("head", "trunk")]
    rates = np.diff(np.array(found), prepend=0.0)
    np.testing.assert_allclose(rates, [[0.05, 0.0251, 2e-4], [5e-4, 3.5e-4, 2e-4]], rtol=1e-4)


def test_update_uses_the_schedule_of_its_own_step():
    params = weight(0.0)
    tx, rate = optim.make(
        params,
        name="sgd",
        momentum=0.0,
        weight_decay=0.0,
        lr=1.0,
        warmup_steps=3,
        total_steps=6,
        steps_per_epoch=2,
    )
    state, seen = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update(weight(1.0), state, params)
        seen.append(-float(updates["kernel"][0, 0]))
    assert seen == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.75, 0.25], abs=1e-6)
    assert seen == pytest.approx([rate(step) for step in range(6)], abs=1e-6)


def test_state_is_plain_and_compiles_once():
    params = {"a": weight(1.0), "b": {"bias": jnp.ones(3)}}
    tx, _ = optim.make(params, **CONSTANT, clip=1.0)
    state, traces = tx.init(params), []

    @jax.jit
    def step(grads, state, params):
        traces.append(1)
        return tx.update(grads, state, params)

    for _ in range(3):
        _, state = step(params, state, params)
    assert len(traces) == 1
    assert counts(state) == {3}
    for name in ("mu", "nu"):
        assert jax.tree.structure(part(state, name)) == jax.tree.structure(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


def test_ema_literal():
    average = {"a": jnp.array([1.0, 2.0])}
    after = optim.ema(average, {"a": jnp.array([3.0, 2.0], jnp.bfloat16)}, 0.9)
    np.testing.assert_allclose(after["a"], [1.2, 2.0], rtol=1e-6)
    assert after["a"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adam"}, "optim.name is 'adam': did you mean adamw"),
        ({"decay": "non_1d"}, "optim.decay is 'non_1d': did you mean not_1d"),
        ({"schedule": "cosinus"}, "optim.schedule is 'cosinus'"),
        ({"clip": 0.0}, "optim.clip is 0.0: give a number above 0"),
        ({"frozen": ("clstoken",)}, "no parameter matches any of frozen"),
        ({"backbone_min_lr": 0.1, "min_lr": 0.1}, "backbone_min_lr=0.1 needs a schedule that falls"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        optim.make(tree(), **{**CONSTANT, **options})


def test_update_with_wrong_parameters():
    tx, _ = optim.make(weight(1.0), **CONSTANT)
    state = tx.init(weight(1.0))
    with pytest.raises(ValueError, match="requires the current value of parameters"):
        tx.update(weight(1.0), state)
    other = {"weight": jnp.ones((1, 1))}
    with pytest.raises(ValueError, match="made for other parameters: 'kernel'"):
        tx.update(other, tx.init(other), other)
