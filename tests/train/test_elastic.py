"""Keep rates that take turns: which step has which, one program each, and a resumed run is the uninterrupted one."""

import collections

import pytest

from dyntoken import train
from dyntoken.train.build import Run, build
from tests.train.test_loop import CrashError, Log, assert_identical, crash, rows
from tests.train.tiny import SMALL, tiny_config

ETPS = {"name": "etps_deit_tiny_patch8_16", **SMALL, "depth": 2, "at": (1,), "keep": 0.5}


def elastic(**overrides):
    return tiny_config(model=ETPS, elastic=(0.5, 1.0, 0.75), **overrides)


@pytest.mark.thorough
def test_largest_and_smallest_take_their_turns_and_the_rest_is_drawn():
    run = build(elastic())
    assert [phase.counts for phase in run.phases] == [(4,), (3,), (2,)]
    order = [run.phase_at(done) for done in range(300)]
    assert order[::3] == [0] * 100 and order[1::3] == [2] * 100
    drawn = collections.Counter(order[2::3])
    assert set(drawn) == {0, 1, 2} and max(drawn.values()) < 60
    assert order == [build(elastic()).phase_at(done) for done in range(300)]
    assert order != [build(elastic(seed=1)).phase_at(done) for done in range(300)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"name": "deit_tiny_patch8_16", **SMALL}}, "has no keep rate"),
        ({"keep_schedule": {"end_epoch": 1}}, "give one of both"),
        ({"elastic": (0.5, 1.5)}, r"\(0, 1\]"),
    ],
)
def test_what_does_not_fit_is_said(changes, says):
    with pytest.raises(ValueError, match=says):
        build(tiny_config(**{"model": {**ETPS}, "elastic": (0.5, 1.0), **changes}))


@pytest.mark.thorough
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    compiled, programs, real = [], {}, Run.train_step_for

    def train_step_for(run, model):
        compiled.append(model.keep)
        if model.keep not in programs:
            programs[model.keep] = real(run, model)
        return programs[model.keep]

    monkeypatch.setattr(Run, "train_step_for", train_step_for)
    own = elastic(steps=7, checkpoint_steps=4)
    log = Log()
    straight = train.run(own, tmp_path / "straight", log=log)
    assert "tokens kept in turn, a compilation each: 4, 3, 2" in log
    assert len(compiled) == len(set(compiled)) <= 3  # each once, however often they take turns
    with pytest.raises(CrashError):
        train.run(own, tmp_path / "crashed", log=Log("step 6/7", crash))
    resumed = train.run(own, tmp_path / "crashed", log=Log())
    assert_identical(resumed.state, straight.state)
    assert rows(tmp_path / "crashed") == rows(tmp_path / "straight")
