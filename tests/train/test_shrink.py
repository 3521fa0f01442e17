"""A keep rate that falls: stages by the step alone, one compilation each."""

from __future__ import annotations

import pytest

from dyntoken import create_model, train
from dyntoken.train import loop, phases
from dyntoken.train.build import Run, build
from dyntoken.train.settings import KeepSchedule, read
from tests.train.test_loop import CrashError, Log, assert_identical, crash, rows
from tests.train.tiny import DENSE, DTPS, SMALL, tiny_config

EVIT = {"name": "evit_deit_tiny_patch4_16", "keep": 0.5, "at": (0, 1), **SMALL, "depth": 2}


def test_stages_of_evit():
    """From step 2 to 10 a cosine from 1 to 0.5: below 0.875 after a third of it, below 0.625 after two."""
    model = create_model(**EVIT)
    found = phases.falling(model, KeepSchedule(1, 5, levels=3), steps_per_epoch=2, total_steps=20)
    assert [(one.first, one.counts) for one in found] == [(0, (16, 16)), (5, (12, 10)), (8, (8, 5))]
    assert [one.model.keep for one in found] == [1.0, 0.75, 0.5] and found[-1].model == model
    cut = phases.falling(model, KeepSchedule(1, 5, levels=3), steps_per_epoch=2, total_steps=8)
    assert [one.first for one in cut] == [0, 5]  # the last stage would begin after the end
    fine = phases.falling(model, KeepSchedule(0, 4, levels=40), steps_per_epoch=100, total_steps=400)
    counts = [one.counts for one in fine]
    assert len(counts) == len(set(counts)) < 40 and counts[-1] == (8, 5)  # alike ones are one


def test_no_schedule_is_one_stage():
    for given in (None, {}, {"start_epoch": 10, "end_epoch": 0, "levels": 5}):
        schedule = read(tiny_config(keep_schedule=given)).keep_schedule
        model = create_model(DENSE)
        parts = phases.falling(model, schedule, steps_per_epoch=1, total_steps=1)
        assert [(one.first, one.model) for one in parts] == [(0, model)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": DTPS, "keep": 0.5, "at": (0,)}, r"does not fit dtps: its predictor learns .*evit, topk"),
        ({"name": DENSE}, r"needs a model that drops tokens .* has no keep rate of its own"),
        ({**EVIT, "keep": (8, 5)}, r"config.model.keep is \(8, 5\): give a number"),
    ],
)
def test_models_whose_rate_cannot_fall(model, message):
    losses = {"ce": {}, "keep_ratio": {}} if model["name"] == DTPS else {"ce": {}}
    own = tiny_config(model={**SMALL, "depth": 2, **model}, losses=losses, keep_schedule={"end_epoch": 1})
    with pytest.raises(ValueError, match=message):
        build(own)


def test_a_key_that_nothing_reads():
    with pytest.raises(ValueError, match=r"'epochs' of config.keep_schedule: did you mean .*end_epoch"):
        build(tiny_config(keep_schedule={"epochs": 3}))


@pytest.mark.thorough
def test_a_run_in_stages_resumes_within_the_second(tmp_path, monkeypatch):
    compiled, programs, real = [], {}, Run.train_step_for

    def train_step_for(run, model):
        compiled.append(model.keep)
        if model.keep not in programs:
            programs[model.keep] = real(run, model)
        return programs[model.keep]

    monkeypatch.setattr(Run, "train_step_for", train_step_for)
    monkeypatch.setattr(loop, "measure", lambda *_: {"top1": 0.5, "count": 37})
    model = {**EVIT, "depth": 1, "at": (0,)}
    own = tiny_config(model=model, steps=5, checkpoint_steps=3, keep_schedule={"end_epoch": 1, "levels": 2})
    log = Log()
    straight = train.run(own, tmp_path / "straight", log=log)
    assert "tokens kept in 2 stages, a compilation each: 16 from step 0, 8 from step 2" in log
    assert compiled == [1.0, 0.5] and straight.model.keep == 0.5

    with pytest.raises(CrashError):
        train.run(own, tmp_path / "crashed", log=Log("step 4/5", crash))
    compiled.clear()
    resumed = train.run(own, tmp_path / "crashed", log=Log())
    assert compiled == [0.5]  # step 3 is saved, so the first stage is over
    assert_identical(resumed.state, straight.state)
    assert rows(tmp_path / "crashed") == rows(tmp_path / "straight")
