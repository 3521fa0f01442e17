"""Training: a pure per-device step and the loop, checkpoints and reports around it."""

from dyntoken.train.build import Run, build, dry_run
from dyntoken.train.evaluate import evaluate, measure, open_workdir
from dyntoken.train.loop import Result, run
from dyntoken.train.state import TrainError, TrainState
from dyntoken.train.step import train_step

__all__ = [
    "Result",
    "Run",
    "TrainError",
    "TrainState",
    "build",
    "dry_run",
    "evaluate",
    "measure",
    "open_workdir",
    "run",
    "train_step",
]
