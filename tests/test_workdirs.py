"""Which checkpoint is meant: newest, best, or one by its step."""

from __future__ import annotations

import json
import math

import pytest
from etils import epath

from dyntoken import workdirs


def write(tmp_path, rows, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, ')
    return epath.Path(tmp_path)


EVALS = [
    {"step": 2, "kind": "eval", "top1": 0.5, "loss": 1.5, "ema/top1": 0.1},
    {"step": 2, "kind": "train", "top1": 0.99, "loss": 0.1},
    {"step": 4, "kind": "eval", "top1": 0.7, "loss": math.nan, "ema/top1": 0.1},
    {"step": 6, "kind": "eval", "top1": 0.6, "loss": 1.0, "ema/top1": 0.1},
    {"step": 8, "kind": "eval", "top1": 0.9, "loss": 0.5, "ema/top1": 0.1},
]
STEPS = [2, 4, 6, 10]  # 8 is not there any more, 10 was not evaluated


@pytest.mark.parametrize(
    ("metric", "order"),
    [
        ("top1", [4, 6, 2]),
        ("loss", [6, 2, 4]),
        ("ema/top1", [6, 4, 2]),
    ],  # low loss first, NaN last, late first
)
def test_best_first(tmp_path, metric, order):
    workdir = write(tmp_path, EVALS, best_metric=metric)
    assert workdirs.candidates(workdir, STEPS, "best") == order


def test_newest_and_a_number(tmp_path):
    assert workdirs.candidates(epath.Path(tmp_path), STEPS) == [10, 6, 4, 2]
    assert workdirs.candidates(epath.Path(tmp_path), STEPS, 4) == [4]
    assert workdirs.candidates(epath.Path(tmp_path), STEPS, "4") == [4]  # as a command line has it


def test_the_later_evaluation_of_a_step_counts(tmp_path):
    rows = [{"step": 2, "kind": "eval", "top1": 0.9}, {"step": 4, "kind": "eval", "top1": 0.5}]
    workdir = write(tmp_path, [*rows, {"step": 2, "kind": "eval", "top1": 0.1}])
    assert workdirs.candidates(workdir, STEPS, "best") == [4, 2]  # top1 unless the run says otherwise


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (3, r"no checkpoint of step 3; it has: 2, 4, 6, 10$"),
        ("bets", r"step='bets': choose newest, best or one of the steps 2, 4, 6, 10$"),
        ("best", r"no evaluation of 'top1' at a checkpoint \(2, 4, 6, 10\): .*keep_best > 0"),
    ],
)
def test_errors(tmp_path, which, message):
    with pytest.raises(workdirs.CheckpointError, match=message):
        workdirs.candidates(epath.Path(tmp_path), STEPS, which)
