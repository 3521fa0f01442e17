"""Where a run starts: its own workdir, another run, weights, or fresh variables."""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from dyntoken import paths, weights
from dyntoken.train import hosts, identity, sharding
from dyntoken.train.build import Run
from dyntoken.train.checkpoint import Checkpoints, Restored, restore_from
from dyntoken.train.clock import Clock
from dyntoken.train.logging import atomic_write
from dyntoken.train.rewind import Rewinds
from dyntoken.train.state import TrainState
from dyntoken.weights import runs

Tree = Any
Log = Callable[[str], None]
EVALUATED = ("model", "data", "evals")  # sections of a config on which an evaluation depends
OLD = "old"


@dataclasses.dataclass(frozen=True)
class Start:
    """What a session goes on from.

    Attributes:
      state: after the last step that counts.
      clock: with the time that it took.
      rewinds: those on the way there.
      same: whether this very config made it, as far as an evaluation goes.
      meta: of its checkpoint in this workdir, {} without one.
    """

    state: TrainState
    clock: Clock
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
        identity.check(settings.resume, run)
        found = restore_from(settings.resume, run.abstract_state, log=log)
        log(f"going on from step {found.step} of {settings.resume}")
        return _from(found, run, log)
    variables = load_init(run, log) if (settings.init or {}).get("path") else None
    return Start(run.new_state(variables), Clock(), Rewinds(settings.rewind), True)


def _from(found: Restored, run: Run, log: Log) -> Start:
    same = _compare(found, run.settings.plain, log)
    rewinds = Rewinds(run.settings.rewind, found.meta.get("rewinds", ()))
    return Start(found.state, Clock(found.meta.get("seconds", 0.0)), rewinds, same)


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


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted names."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for key, node in tree.items() for k, v in flat(node, f"{prefix}.{key}".strip(".")).items()}


def facts(run: Run) -> dict[str, Any]:
    """What has to be the same on every host; where the data lie may differ."""
    facts = {f"config.{name}": value for name, value in flat(run.settings.plain).items()}
    facts.pop("config.data.data_dir", None)
    info = run.info
    facts |= {f"the size of split {name!r}": size for name, size in info.splits.items()}
    for label, one in run.eval_sets.items():
        if label:
            facts |= {f"the size of split {k!r} of {label}": size for k, size in one.info.splits.items()}
            facts.pop(f"config.evals.{label}.data_dir", None)
    names = zlib.crc32("\n".join(info.class_names).encode())
    return facts | {"the number of classes": info.num_classes, "the checksum of the class names": names}


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
        atomic_write(workdir / "config.json", json.dumps(run.settings.plain, indent=2) + "\n")


load_for_training = functools.partial(weights.load_weights, return_report=True)


def load_init(run: Run, log: Log, load: Callable[..., Any] = load_for_training) -> Tree:
    """The variables that `config.init` names; `load` as `load_weights` that returns its report."""
    options = dict(run.settings.init)
    path = options.pop("path")
    if options.get("head", "keep") == "keep":
        remedy = "give init.head=reset for a fresh classifier"
        identity.check_classes(runs.of_workdir(path, options.get("step", "newest")), run, path, remedy)
    variables, report = hosts.agree(lambda: load(run.model, path, **options), _checksum)
    log(f"initial weights: {report}")
    return variables


def load_teacher(run: Run, log: Log) -> Tree:
    """The teacher's variables on every device, `{}` without a teacher."""
    if run.teacher is None:
        return {}
    path = run.settings.teacher["weights"]
    identity.check_classes(runs.of_workdir(path), run, f"the teacher in {path}", "name another teacher")
    variables, report = hosts.agree(
        lambda: weights.load_weights(run.teacher, path, return_report=True), _checksum
    )
    log(f"teacher: {report}")
    return sharding.replicate(variables, run.mesh)


def _checksum(loaded: tuple[Tree, Any]) -> dict[str, Any]:
    return {"the checksum of the weights": hosts.digest(loaded[0])}
