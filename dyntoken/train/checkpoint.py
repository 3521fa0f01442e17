"""Checkpoints that are either whole or refused.

Orbax writes them (asynchronously, atomically); it restores a flipped bit
without a word, so every leaf travels with a checksum in the JSON item, which
has one of its own. A damaged checkpoint is set aside and the one before it is
used.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dyntoken.train.mesh import gathered
from dyntoken.train.state import TrainState
from dyntoken.weights import workdirs

Tree = Any
Log = Callable[[str], None]
FOLDER = workdirs.CHECKPOINTS


class CheckpointError(RuntimeError):
    """No checkpoint can be used; the message says why and what to do."""


class _DamagedError(Exception):
    """One checkpoint is not what was written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint: the state, and what was saved beside it."""

    state: TrainState
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.meta["step"])


def folder(workdir: str | epath.PathLike) -> epath.Path:
    """Where a run keeps its checkpoints."""
    return epath.Path(workdir).expanduser().absolute() / FOLDER


@dataclasses.dataclass
class _Chosen(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the steps that a function chooses."""

    choose: Callable[[list[int]], Collection[int]]

    def should_preserve(self, checkpoints: Iterable[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        chosen = self.choose(steps)
        return [step in chosen for step in steps]


class Checkpoints:
    """The checkpoints of one run, `<workdir>/checkpoints/<step>/{state,meta}`.

    Args:
      workdir: folder of the run; may be on `gs://`.
      keep: how many of the newest to keep; at least 2 leave one to fall back to.
      also: which of some steps to keep besides; asked at every save.
      log: takes one line of text.
    """

    def __init__(
        self,
        workdir: str | epath.PathLike,
        *,
        keep: int = 2,
        also: Callable[[list[int]], Collection[int]] = lambda steps: (),
        log: Log = print,
    ):
        if keep < 1:
            raise ValueError(f"keep_checkpoints must be at least 1, not {keep}")
        managers = ocp.checkpoint_managers
        self._log = log
        self._manager = ocp.CheckpointManager(
            folder(workdir),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(keep), _Chosen(also)]),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
        )
        self._newest = -1

    def save(self, state: TrainState, **meta: Any) -> None:
        """Starts writing a copy of the state, unless this step is saved already.

        Args:
          state: replicated over the devices, or in pieces on them.
          **meta: JSON values to keep beside it.
        """
        step = int(state.step)
        if step == self._newest:
            return
        flat = {name: _host(leaf) for name, leaf in flatten(state).items()}
        meta = {"step": step, **meta, "leaves": {name: _describe(leaf) for name, leaf in flat.items()}}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(flax.traverse_util.unflatten_dict(flat, sep="/")),
                meta=ocp.args.JsonSave({**meta, "checksum": _checksum(meta)}),
            ),
            force=True,  # without it a save that meets a running one is skipped
        )
        self._newest = step

    def restore(
        self, like: TrainState, *, among: Callable[[int], bool] = lambda step: True
    ) -> Restored | None:
        """The newest intact checkpoint, or None if there is none at all.

        Damaged ones are moved to `<workdir>/damaged/<step>`.

        Args:
          like: shapes, types and shardings to restore to (`mesh.like`);
            any number of devices.
          among: which steps come into question.

        Raises:
          CheckpointError: if all are damaged, or they hold another model.
        """
        steps = sorted(filter(among, self._manager.all_steps()), reverse=True)
        found = _first_intact(self._manager, steps, like, self._log, self._set_aside)
        self._newest = found.step if found else -1
        return found

    def forget(self, step: int) -> None:
        """Deletes what was saved after a step: the run takes another way from there."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def _set_aside(self, step: int) -> None:
        source = epath.Path(self._manager.directory) / str(step)
        target = source.parent.parent / "damaged" / str(step)
        if jax.process_index() == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rmtree()
            source.rename(target)
        _barrier(f"dyntoken_set_aside_{step}")
        self._manager.reload()

    def preempted(self, step: int) -> bool:
        """Whether the cluster is about to stop the (multi-process) job."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when all that was saved is on disk; raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes pending writes and releases the manager."""
        # Orbax joins its cleaning thread when it saves, not here: an interpreter that exits
        # before that thread is done prints its stack trace after our one line.
        cleaned = getattr(self._manager, "_maybe_await_cleanup_tmp_directory", None)
        if cleaned is not None:
            cleaned()
        self._manager.close()


def restore_from(
    workdir: str | epath.PathLike, like: TrainState, *, step: int | str = "newest", log: Log = print
) -> Restored:
    """The newest intact checkpoint of another run, which is left untouched.

    Args:
      workdir: of that run.
      like: as in `Checkpoints.restore`.
      step: "newest", "best" (by the run's `best_metric`, the next best where
        it is damaged) or the number of a step.
      log: takes one line of text.

    Raises:
      CheckpointError: if there is none, all are damaged, or they hold another model.
    """
    where = folder(workdir)
    if not where.exists():
        raise CheckpointError(f"no checkpoints in {where}: give the workdir of a run")
    manager = ocp.CheckpointManager(where, options=ocp.CheckpointManagerOptions(create=False))
    try:
        steps = workdirs.candidates(where.parent, manager.all_steps(), step)
        found = _first_intact(manager, steps, like, log, lambda step: None)
    except workdirs.NoCheckpointError as error:
        raise CheckpointError(str(error)) from error
    finally:
        manager.close()
    if found is None:
        raise CheckpointError(f"no finished checkpoint in {where}: give the workdir of a run")
    return found


def flatten(state: TrainState) -> dict[str, jax.Array]:
    """Leaves by name, `params/backbone/...`; what is absent (no EMA) has no name."""
    tree = flax.serialization.to_state_dict(state)
    leaves = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}


def _unflatten(like: TrainState, flat: Mapping[str, Any]) -> TrainState:
    tree = flax.traverse_util.flatten_dict(
        flax.serialization.to_state_dict(like), sep="/", keep_empty_nodes=True
    )
    tree = flax.traverse_util.unflatten_dict(tree | dict(flat), sep="/")
    return flax.serialization.from_state_dict(like, tree)


def _first_intact(
    manager: ocp.CheckpointManager,
    steps: Sequence[int],
    like: TrainState,
    log: Log,
    set_aside: Callable[[int], None],
) -> Restored | None:
    for step in steps:
        try:
            return _restore(manager, step, like)
        except _DamagedError as error:
            log(f"checkpoint {step} in {manager.directory} is damaged ({error}); trying the one before")
            set_aside(step)
    if steps:
        raise CheckpointError(
            f"no checkpoint in {manager.directory} is intact: restore the folder from a backup, "
            "or use another workdir to start again"
        )
    return None


def _restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> Restored:
    meta = _read_meta(manager, step)
    wanted = flatten(like)
    _check_same_model(meta["leaves"], wanted, f"{manager.directory}/{step}")
    try:
        args = ocp.args.StandardRestore(flax.traverse_util.unflatten_dict(wanted, sep="/"))
        tree = manager.restore(step, args=ocp.args.Composite(state=args)).state
    except Exception as error:
        raise _DamagedError(_first_line(error)) from error
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    for name, leaf in flat.items():
        if _describe(_host(leaf)) != meta["leaves"][name]:
            raise _DamagedError(f"{name} has another checksum than when it was written")
    return Restored(_unflatten(like, flat), meta)


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    try:
        meta = dict(manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta)
        written = meta.pop("checksum")
    except Exception as error:
        raise _DamagedError(_first_line(error)) from error
    if _checksum(meta) != written:
        raise _DamagedError("its description has another checksum than when it was written")
    return meta


def _check_same_model(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    here = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in wanted.items()}
    for name in sorted(saved.keys() | here.keys()):
        there = saved[name][:2] if name in saved else "absent"
        if there != here.get(name, "absent"):
            raise CheckpointError(
                f"{where} holds another run: {name} is {there} there, {here.get(name, 'absent')} here; "
                "use another workdir (and init.path to start from its weights)"
            )


def _host(leaf: jax.Array) -> np.ndarray:
    """A copy of a whole array. What is written and what is summed up are these very bytes:
    on a CPU an array without a copy is a view, and the next step reuses the donated memory."""
    return np.array(gathered(leaf).addressable_data(0), order="C")


def _describe(value: np.ndarray) -> list[Any]:
    """[shape, type, CRC-32] of an array."""
    return [list(value.shape), str(value.dtype), zlib.crc32(value.reshape(-1).view(np.uint8))]


def _checksum(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
