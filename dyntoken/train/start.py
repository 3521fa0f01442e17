"""Where a run starts: its own workdir, another run, weights, or fresh variables; and going back."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from dyntoken import paths, weights
from dyntoken.checkpoints import Checkpoints, Restored, restore_from
from dyntoken.data.info import class_difference, list_names
from dyntoken.models import split_name
from dyntoken.multihost import all_or_none, digest
from dyntoken.train import sharding
from dyntoken.train.build import Run, flat
from dyntoken.train.logging import NotFiniteError
from dyntoken.train.state import TrainError, TrainState
from dyntoken.weights import runs
from dyntoken.workdirs import CONFIG, CheckpointError

Tree = Any
Log = Callable[[str], None]
EVALUATED = ("model", "data", "evals")  # sections of a config on which an evaluation depends
OLD = "old"
REMEDY = "Lower optim.lr, set optim.clip or lengthen the warm-up, then run again"


class Rewinds:
    """The rewinds of a run, part of each checkpoint from there on.

    After a rewind the batches up to the bad one are left out, and the draws
    that are keyed by the position of a row are others: a function of the seed
    and of the rewinds alone. A run that is killed after one, and before the
    next checkpoint, meets the bad step again and goes the same way.

    Args:
      allowed: how many there may be in the whole run.
      done: (step gone back to, bad step) of each so far.
    """

    def __init__(self, allowed: int, done: Iterable[Sequence[int]] = ()):
        self._allowed = allowed
        self.done = [[int(back), int(bad)] for back, bad in done]

    @property
    def data(self) -> dict[str, int]:
        """Arguments of `Run.train_batches`."""
        return {"skipped": sum(bad - back for back, bad in self.done), "rewinds": len(self.done)}

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rewinds": self.done} if self.done else {}

    def check(self, bad: NotFiniteError, saved: int | None) -> None:
        """Raises `TrainError` if the run may not go back (again); `saved` is the step of the last checkpoint."""
        if len(self.done) < self._allowed:
            return
        spent = f"; it went back {len(self.done)} times already (config.rewind)" if self.done else ""
        last = "nothing was saved" if saved is None else f"nothing after step {saved} was saved"
        raise TrainError(f"{bad}; {last}{spent}. {REMEDY}") from bad

    def add(self, back: int, bad: NotFiniteError) -> str:
        """Notes a rewind; returns what to say about it."""
        self.done.append([back, bad.step])
        return (
            f"{bad}; going back to step {back}, rewind {len(self.done)} of {self._allowed}: the next images "
            f"are those after step {bad.step}"
        )


@dataclasses.dataclass(frozen=True)
class Start:
    """What a session goes on from.

    Attributes:
      state: after the last step that counts.
      seconds: of training that it took.
      rewinds: those on the way there.
      same: whether this very config made it, as far as an evaluation goes.
      meta: of its checkpoint in this workdir, {} without one.
    """

    state: TrainState
    seconds: float
    rewinds: Rewinds
    same: bool
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def start(run: Run, checkpoints: Checkpoints, log: Log) -> Start:
    """The newest checkpoint of the run, or its beginning."""
    found = checkpoints.restore(run.abstract_state)
    if found is None:
        return beginning(run, log)
    if found.step > run.total_steps:
        log(
            f"the run is at step {found.step} already, this config ends at {run.total_steps}: nothing to train"
        )
    else:
        log(f"resuming at step {found.step} of {run.total_steps}")
    return dataclasses.replace(_from(found, run, log), meta=found.meta)


def beginning(run: Run, log: Log) -> Start:
    """Where a run without checkpoints starts: `config.resume`, `config.init` or fresh variables."""
    settings = run.settings
    if settings.resume:
        check_same_run(settings.resume, run)
        found = restore_from(settings.resume, run.abstract_state, log=log)
        log(f"going on from step {found.step} of {settings.resume}")
        return _from(found, run, log)
    variables = load_init(run, log) if (settings.init or {}).get("path") else None
    return Start(run.new_state(variables), 0.0, Rewinds(settings.rewind), True)


def _from(found: Restored, run: Run, log: Log) -> Start:
    same = _compare(found, run.settings.plain, log)
    rewinds = Rewinds(run.settings.rewind, found.meta.get("rewinds", ()))
    return Start(found.tree, found.meta.get("seconds", 0.0), rewinds, same)


def _compare(found: Restored, config: Mapping[str, Any], log: Log) -> bool:
    if not isinstance(found.meta.get("config"), Mapping):
        log("the checkpoint was written by another version, which did not keep the config: not compared")
        return False
    before, now = flat(found.meta["config"]), flat(config)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        shown = ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in changed[:6])
        log(f"the config differs from the checkpoint's: {shown}" + (", ..." if len(changed) > 6 else ""))
    return not any(key.split(".")[0] in EVALUATED for key in changed)


def move_aside(workdir: epath.Path, log: Log) -> None:
    """Moves what a run has left in a workdir to `<workdir>/old/N`, a workdir of its own."""
    if jax.process_index() != 0:
        return
    left = [e for e in workdir.iterdir() if e.name != OLD and not e.name.startswith(("lock-", ".probe-"))]
    if not left:
        return
    old = workdir / OLD
    taken = [int(entry.name) for entry in old.iterdir() if entry.name.isdigit()] if old.is_dir() else []
    target = old / str(max(taken, default=0) + 1)
    for entry in left:
        paths.move(entry, target / entry.name)
    log(f"starting anew: the old run is in {target}; leave --restart out to go on with the new one")


def write_config(workdir: epath.Path, run: Run) -> None:
    """Writes what `open_workdir` and a later `--mode=eval` read."""
    if jax.process_index() == 0:
        paths.atomic_write(workdir / CONFIG, json.dumps(run.settings.plain, indent=2) + "\n")


load_for_training = functools.partial(weights.load_weights, return_report=True)


def load_init(run: Run, log: Log, load: Callable[..., Any] = load_for_training) -> Tree:
    """The variables that `config.init` names; `load` as `load_weights` that returns its report."""
    options = dict(run.settings.init)
    path = options.pop("path")
    if options.get("head", "keep") == "keep":
        remedy = "give init.head=reset for a fresh classifier"
        check_classes(runs.of_workdir(path, options.get("step", "newest")), run, path, remedy)
    with _naming("init.path", "or --config.init.path= (empty) to train from scratch"):
        variables, report = all_or_none(lambda: load(run.model, path, **options), _checksum)
    log(f"initial weights: {report}")
    _compare_pixels(run, path, options.get("step", "newest"), log)
    return variables


def load_teacher(run: Run, log: Log) -> Tree:
    """The teacher's variables on every device, `{}` where there are none of its own."""
    if run.teacher is None or run.settings.self_teaching:
        return {}
    path = run.settings.teacher["weights"]
    check_classes(runs.of_workdir(path), run, f"the teacher in {path}", "name another teacher")
    with _naming("teacher.weights", "or leave out the losses that need a teacher"):
        variables, report = all_or_none(
            lambda: weights.load_weights(run.teacher, path, return_report=True), _checksum
        )
    log(f"teacher: {report}")
    _compare_pixels(run, path, "newest", log)
    return sharding.replicate(variables, run.mesh)


@contextlib.contextmanager
def _naming(key: str, otherwise: str) -> Iterator[None]:
    """Says by which key of the config weights that are not there may be given, and what goes without them."""
    try:
        yield
    except weights.NoWeightsError as error:
        near = f"{error.near}, another " if error.near else ""
        remedy = f"give --config.{key}={near}FILE, FOLDER or hf:ORG/NAME, {otherwise}: see docs/howto.md"
        raise weights.NoWeightsError(error.name, None, remedy) from error


def _compare_pixels(run: Run, path: Any, step: int | str, log: Log) -> None:
    """A line where weights are of pixels with another mean or deviation than the run's."""
    told = weights.images_of(path, step)
    for name, own in zip(("mean", "std"), run.normalization, strict=True):
        theirs = told.get(name, own)
        if len(theirs) == len(own) and not np.allclose(theirs, own, atol=1e-3):
            said = ",".join(f"{value:g}" for value in theirs)
            log(
                f"warning: {path} had pixels of another {name}: --config.data.{name}={said} gives it the same"
            )


def _checksum(loaded: tuple[Tree, Any]) -> dict[str, Any]:
    return {"the checksum of the weights": digest(loaded[0])}


def check_same_run(workdir: Any, run: Run, step: int | str = "newest") -> None:
    """Refuses a run whose classes or patch grid are not those of the run.

    Their arrays may have the very same shapes. What cannot be read is left to
    those who restore it.

    Args:
      workdir: of the run whose checkpoint is to be restored.
      run: of the run that is to go on from it.

    Raises:
      CheckpointError: names both.
    """
    meta = runs.of_workdir(workdir, step)
    check_classes(meta, run, workdir, "use another workdir (init.path and init.head=reset take its weights)")
    named, model = (runs.section_of(meta) or {}).get("name"), run.settings.model["name"]
    if named and split_name(named)[1] != split_name(model)[1]:
        raise CheckpointError(
            f"{workdir} is a run of {named}, this config has model.name={model}: use another workdir, or set "
            "model.name as it was"
        )
    before, now = runs.grids_of(meta), runs.grids(run.model)
    placed = any(name.endswith("pos_embed") for name in meta.get("leaves", ()))
    if placed and before and before != now:
        raise CheckpointError(
            f"{workdir} was trained on patches of {' / '.join(before.values())}, this config has "
            f"{' / '.join(now.values())}: its position embedding belongs to other places. "
            "Set data.size as it was, or start another workdir from its "
            "weights (init.path), which resizes them"
        )


def check_classes(meta: Mapping[str, Any], run: Run, where: Any, remedy: str) -> None:
    """Raises `CheckpointError` unless a description names the classes of the run, see `class_difference`."""
    before, now = runs.class_names(meta), list(run.info.class_names)
    if difference := class_difference("the run", before, "the data", now):
        raise CheckpointError(
            f"{where} was trained on {len(before)} classes ({list_names(before)}), data set {run.info.name!r} has "
            f"{len(now)} ({list_names(now)}): {difference}. Give the data as it was, or {remedy}"
        )
