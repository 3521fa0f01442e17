"""What is promised of a run's numbers: the same bits on the same devices, the same but for rounding on others."""

from __future__ import annotations

import functools
import itertools

import chex
import jax
import numpy as np
import pytest

from dyntoken.train import sharding
from dyntoken.train.build import build
from dyntoken.train.state import init_variables
from tests.train.tiny import DTPS, SMALL, tiny_config

REDUCED = {"depth": 2, "at": (1,), "keep": 0.5}
MODELS = {
    "dtps": {"name": DTPS, **SMALL, **REDUCED},
    "etps": {"name": "etps_deit_tiny_patch8_16", **SMALL, **REDUCED},
    "dvt": {"name": "dvt_deit_tiny", **SMALL, "exits": (1, 2), "context_width": 4, "context_hidden": 4},
    "lvvit": {"name": "dtps_lvvit_s", "width": 8, "heads": 2, "stem_width": 4, "patch_size": 8, **REDUCED},
    "psvit": {"name": "dtps_psvit_ti_14", "width": 8, "heads": 2, **REDUCED},
}
NOISE = {"dropout": 0.1, "drop_path": 0.3, "drop_path_rule": "constant"}
STEPS = 2


@functools.cache
def run(family, devices):
    losses = {"ce": {}}
    if family == "dvt":
        losses = {"ce": {"weights": (0.5, 1.0)}}
    elif family in ("dtps", "lvvit", "psvit"):
        losses["keep_ratio"] = {"weight": 2.0}
    config = tiny_config(
        model={**MODELS[family], **NOISE},
        losses=losses,
        # SGD: AdamW turns a gradient that is zero but for rounding into a whole step.
        optim={"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "clip": 1.0},
        ema=0.9,
    )
    return build(config, devices=jax.devices()[:devices])


def trained(family, devices):
    """(state, metrics of each step, evaluated sums) on the first devices."""
    made = run(family, devices)
    variables = jax.jit(lambda: init_variables(made.model, made.shape, 0))()
    # As if trained: of scores that are alike, rounding would choose.
    state = made.new_state(jax.tree.map(lambda p: 10 * p if p.ndim > 1 else p, variables))
    history = []
    for batch in itertools.islice(made.train_batches(0), STEPS):
        state, metrics = made.train_step(state, {}, sharding.place(batch, made.mesh))
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


@functools.cache
def of_one(family):
    return trained(family, 1)


SLOW = pytest.mark.slow
FAMILIES = ["dtps", *(pytest.param(family, marks=SLOW) for family in MODELS if family != "dtps")]


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("devices", [1, 4])
def test_the_same_devices_give_the_same_bits(family, devices):
    first = of_one(family) if devices == 1 else trained(family, devices)
    jax.tree.map(np.testing.assert_array_equal, trained(family, devices), first)


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("devices", [pytest.param(2, marks=SLOW), 4])
def test_other_devices_differ_by_rounding_alone(family, devices):
    """Draws, mixing pairs, batch statistics and loss counts are those of the global batch."""
    state, history = trained(family, devices)
    one, history_of_one = of_one(family)
    chex.assert_trees_all_close(history, history_of_one, rtol=1e-5, atol=1e-5)
    # Relative for variances of a batch, which are far above 1.
    chex.assert_trees_all_close(state.variables, one.variables, rtol=2e-6, atol=1e-5)
    chex.assert_trees_all_close(state.ema, one.ema, rtol=2e-6, atol=1e-5)
