"""Checkpoints that are either whole or refused.

Orbax writes them (asynchronously, atomically); it restores a flipped bit
without a word, so every leaf travels with a checksum in the JSON item, which
has one of its own. A damaged checkpoint is set aside and the one before it is
used. Damaged is only what could be read whole and is not what was written; a
storage that fails ends the run and nothing is moved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dyntoken import paths
from dyntoken.train.sharding import gathered
from dyntoken.train.state import TrainState
from dyntoken.weights import workdirs

Tree = Any
Log = Callable[[str], None]
FOLDER = workdirs.CHECKPOINTS
RETRY_PAUSES_S = (1.0, 5.0, 15.0)  # a network file system comes back within them, or not soon


REMEDY = (
    "restore the folder from a backup, use another workdir, or give --restart to start anew here (the old "
    "run is kept, moved aside)"
)


class CheckpointError(RuntimeError):
    """No checkpoint can be used; the message says why and what to do."""


class StorageError(OSError):
    """The storage of the checkpoints cannot be read or written now; nothing was moved or lost."""


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
    return paths.resolve(workdir) / FOLDER


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

    @property
    def newest(self) -> int | None:
        """The step that was saved or restored last."""
        return self._newest if self._newest >= 0 else None

    def save(self, state: TrainState, **meta: Any) -> None:
        """Starts writing a copy of the state, unless this step is saved already.

        Args:
          state: replicated over the devices, or in pieces on them.
          **meta: JSON values to keep beside it.

        Raises:
          StorageError: the disk is full; also for the checkpoint before, which was still being written.
        """
        step = int(state.step)
        if step == self._newest:
            return
        flat = {name: _host(leaf) for name, leaf in flatten(state).items()}
        meta = {"step": step, **meta, "leaves": {name: _describe(leaf) for name, leaf in flat.items()}}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(flax.traverse_util.unflatten_dict(flat, sep="/")),
                    meta=ocp.args.JsonSave({**meta, "checksum": workdirs.checksum(meta)}),
                ),
                force=True,  # without it a save that meets a running one is skipped
            )
        self._newest = step

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Calls a full disk by its name."""
        try:
            yield
        except Exception as error:
            if not any(sign in str(error) for sign in ("No space left", "quota exceeded", "File too large")):
                raise
            raise StorageError(
                f"the disk of {self._manager.directory} is full: a checkpoint could not be written; free "
                "space there, then run the same command again to go on from the one before"
            ) from error

    def restore(
        self, like: TrainState, *, among: Callable[[int], bool] = lambda step: True
    ) -> Restored | None:
        """The newest intact checkpoint, or None if there is none at all.

        Damaged ones that are newer are moved to `<workdir>/damaged/<step>`;
        none is moved where none is intact.

        Args:
          like: shapes, types and shardings to restore to (`mesh.like`);
            any number of devices.
          among: which steps come into question.

        Raises:
          CheckpointError: if all are damaged (now, or set aside before), or they hold another model.
          StorageError: if one cannot be read.
        """
        steps = sorted(filter(among, self._manager.all_steps()), reverse=True)
        if not steps and (aside := sorted(_numbered(self._aside), key=int)):
            raise CheckpointError(
                f"no checkpoint in {self._manager.directory} is intact, damaged ones are in {self._aside} "
                f"({', '.join(aside)}): {REMEDY}"
            )
        found, damaged = _first_intact(self._manager, steps, like, self._log)
        for step in damaged:
            self._set_aside(step)
        self._newest = found.step if found else -1
        return found

    def forget(self, step: int) -> None:
        """Deletes what was saved after a step: the run takes another way from there."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    @property
    def _aside(self) -> epath.Path:
        return epath.Path(self._manager.directory).parent / "damaged"

    def _set_aside(self, step: int) -> None:
        source, target = epath.Path(self._manager.directory) / str(step), self._aside / str(step)
        if jax.process_index() == 0:
            if target.exists():
                target.rmtree()
            paths.move(source, target)
        _barrier(f"dyntoken_set_aside_{step}")
        self._manager.reload()

    def preempted(self, step: int) -> bool:
        """Whether the cluster is about to stop the (multi-process) job."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when all that was saved is on disk; raises what went wrong."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes pending writes and releases the manager."""
        # Orbax joins its cleaning thread when it saves, not here: an interpreter that exits
        # before that thread is done prints its stack trace after our one line.
        cleaned = getattr(self._manager, "_maybe_await_cleanup_tmp_directory", None)
        if cleaned is not None:
            cleaned()
        with self._writing():
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
      StorageError: if one cannot be read.
    """
    where = folder(workdir)
    if not where.exists():
        raise CheckpointError(f"no checkpoints in {where}: give the workdir of a run")
    manager = ocp.CheckpointManager(where, options=ocp.CheckpointManagerOptions(create=False))
    try:
        steps = workdirs.candidates(where.parent, manager.all_steps(), step)
        found, _ = _first_intact(manager, steps, like, log)
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
    manager: ocp.CheckpointManager, steps: Sequence[int], like: TrainState, log: Log
) -> tuple[Restored | None, list[int]]:
    """The first of some steps that is intact (None without steps), and the damaged ones before it."""
    damaged = []
    for step in steps:
        try:
            return _restore(manager, step, like, log), damaged
        except _DamagedError as error:
            log(f"checkpoint {step} in {manager.directory} is damaged ({error}); trying the one before")
            damaged.append(step)
    if steps:
        raise CheckpointError(f"no checkpoint in {manager.directory} is intact: {REMEDY}")
    return None, damaged


def _restore(manager: ocp.CheckpointManager, step: int, like: TrainState, log: Log) -> Restored:
    """One checkpoint; what cannot be read is tried again before it counts as such."""
    where = epath.Path(manager.directory) / str(step)
    workdirs.ignore_late_callbacks()
    for pause in (*RETRY_PAUSES_S, None):
        try:
            return _read(manager, step, like)
        except (CheckpointError, _DamagedError):
            raise
        except Exception as error:
            reason = workdirs.unreadable(where, error)
            if reason is None:
                raise _DamagedError(workdirs.first_line(error)) from error
            if pause is None:
                raise StorageError(
                    f"{where} cannot be read ({reason}); nothing was moved: see to the storage, "
                    "then run the same command again"
                ) from error
            log(f"{where} cannot be read ({reason}); trying again in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


def _read(manager: ocp.CheckpointManager, step: int, like: TrainState) -> Restored:
    meta = {"step": step, **_read_meta(manager, step)}
    wanted, where = flatten(like), f"{manager.directory}/{step}"
    _check_leaves(meta.get("leaves"), where)
    _check_same_model(meta["leaves"], wanted, where)
    args = ocp.args.StandardRestore(flax.traverse_util.unflatten_dict(wanted, sep="/"))
    tree = manager.restore(step, args=ocp.args.Composite(state=args)).state
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    for name, leaf in flat.items():
        if _describe(_host(leaf)) != meta["leaves"][name]:
            raise _DamagedError(f"{name} has another checksum than when it was written")
    return Restored(_unflatten(like, flat), meta)


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    meta = dict(manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta)
    written = meta.pop("checksum")
    if workdirs.checksum(meta) != written:
        raise _DamagedError("its description has another checksum than when it was written")
    return meta


def _check_leaves(leaves: Any, where: str) -> None:
    """A description that is intact, but not as this version writes it."""
    if not isinstance(leaves, Mapping) or not all(
        isinstance(x, list) and len(x) == 3 for x in leaves.values()
    ):
        raise CheckpointError(
            f"{where} was written by another version of dyntoken (its description has no list of arrays with "
            "checksums): go on with that version, or start from its weights (init.path) in another workdir"
        )


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


def _numbered(folder: epath.Path) -> list[str]:
    """The steps that have a folder there."""
    return [entry.name for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
