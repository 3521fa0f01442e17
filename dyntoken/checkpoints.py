"""Checkpoints that are either whole or refused.

They hold a tree of arrays and a JSON description, `<workdir>/checkpoints/<step>/{state,meta}`. Orbax writes
them (asynchronously, atomically); it restores a flipped bit without a word, so every leaf has a checksum in
the description, which has one of its own. A damaged checkpoint is set aside and the one before it is used.
Damaged is only what could be read whole and is not what was written; a storage that fails ends the run and
nothing is moved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
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
from dyntoken.paths import StorageError
from dyntoken.workdirs import FOLDER, CheckpointError, candidates, checksum, numbered

Tree = Any
Log = Callable[[str], None]
RETRY_PAUSES_S = (1.0, 5.0, 15.0)  # a network file system comes back within them, or not soon
REMEDY = (
    "restore the folder from a backup, use another workdir, or give --restart to start anew here (the old "
    "run is kept, moved aside)"
)


class _DamagedError(Exception):
    """One checkpoint is not what was written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint: the tree, and what was saved beside it."""

    tree: Tree
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.meta["step"])


@dataclasses.dataclass
class _Chosen(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the steps that a function chooses.

    Not Orbax's `BestN`: it ranks by a metrics file of each checkpoint that has no checksum (one flipped bit
    there and no checkpoint is found any more), and the last evaluation comes after the last checkpoint.
    """

    choose: Callable[[list[int]], Collection[int]]

    def should_preserve(self, checkpoints: Iterable[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        chosen = self.choose(steps)
        return [step in chosen for step in steps]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      keep: how many of the newest to keep; at least 2 leave one to fall back to.
      also: which of some steps to keep besides; asked at every save.

    Attributes:
      newest: the step that was saved or restored last, None for none.
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
        self.newest: int | None = None

    def save(self, step: int, tree: Tree, **meta: Any) -> None:
        """Starts writing a copy of a tree, unless this step is saved already.

        Args:
          tree: arrays, replicated over the devices or in pieces on them.
          **meta: JSON values to keep beside it.

        Raises:
          StorageError: the disk is full; also for the checkpoint before, which was still being written.
        """
        if step == self.newest:
            return
        flat = {name: _host(leaf) for name, leaf in flatten(tree).items()}
        meta = {"step": step, **meta, "leaves": {name: describe_leaf(leaf) for name, leaf in flat.items()}}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(flax.traverse_util.unflatten_dict(flat, sep="/")),
                    meta=ocp.args.JsonSave({**meta, "checksum": checksum(meta)}),
                ),
                force=True,  # without it a save that meets a running one is skipped
            )
        self.newest = step

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

    def restore(self, like: Tree, *, among: Callable[[int], bool] = lambda step: True) -> Restored | None:
        """The newest intact checkpoint, or None if there is none at all.

        Damaged ones that are newer are moved to `<workdir>/damaged/<step>`;
        none is moved where none is intact.

        Args:
          like: shapes, types and shardings to restore to; any number of devices.
          among: which steps come into question.

        Raises:
          CheckpointError: if all are damaged (now, or set aside before), or they hold another model.
          StorageError: if one cannot be read.
        """
        steps = sorted(filter(among, self._manager.all_steps()), reverse=True)
        aside = epath.Path(self._manager.directory).parent / "damaged"
        if not steps and (before := sorted(numbered(aside))):
            raise CheckpointError(
                f"no checkpoint in {self._manager.directory} is intact, damaged ones are in {aside} "
                f"({', '.join(map(str, before))}): {REMEDY}"
            )
        found, damaged = _first_intact(self._manager, steps, like, self._log)
        for step in damaged:
            if jax.process_index() == 0:
                if (aside / str(step)).exists():
                    (aside / str(step)).rmtree()
                paths.move(epath.Path(self._manager.directory) / str(step), aside / str(step))
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"dyntoken_set_aside_{step}")
            self._manager.reload()
        self.newest = found.step if found else None
        return found

    def forget(self, step: int) -> None:
        """Deletes what was saved after a step: the run takes another way from there."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

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
    workdir: str | epath.PathLike,
    like: Tree,
    *,
    step: int | str = "newest",
    log: Log = print,
    leave_out: str | None = None,
) -> Restored:
    """The newest intact checkpoint of another run, which is left untouched.

    Args:
      like: as in `Checkpoints.restore`.
      leave_out: a part of the tree that is neither read nor verified
        ("opt_state"); it is None in `like`.
      step: "newest", "best" (by the run's `best_metric`, the next best where
        it is damaged) or the number of a step.

    Raises:
      CheckpointError: if there is none, all are damaged, or they hold another model.
      StorageError: if one cannot be read.
    """
    where = folder(workdir)
    if not where.exists():
        raise CheckpointError(f"no checkpoints in {where}: give the workdir of a run")
    manager = ocp.CheckpointManager(where, options=ocp.CheckpointManagerOptions(create=False))
    try:
        steps = candidates(where.parent, manager.all_steps(), step)
        found, _ = _first_intact(manager, steps, like, log, leave_out)
    finally:
        manager.close()
    if found is None:
        raise CheckpointError(f"no finished checkpoint in {where}: give the workdir of a run")
    return found


def folder(workdir: str | epath.PathLike) -> epath.Path:
    """Where a run keeps its checkpoints."""
    return paths.resolve(workdir) / FOLDER


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by name, `params/backbone/...`; what is None has no name."""
    leaves = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(tree), sep="/")
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}


def _first_intact(
    manager: ocp.CheckpointManager,
    steps: Sequence[int],
    like: Tree,
    log: Log,
    leave_out: str | None = None,
) -> tuple[Restored | None, list[int]]:
    """The first of some steps that is intact (None without steps), and the damaged ones before it."""
    damaged = []
    for step in steps:
        try:
            return _restore(manager, step, like, log, leave_out), damaged
        except _DamagedError as error:
            log(f"checkpoint {step} in {manager.directory} is damaged ({error}); trying the one before")
            damaged.append(step)
    if steps:
        raise CheckpointError(f"no checkpoint in {manager.directory} is intact: {REMEDY}")
    return None, damaged


def _restore(
    manager: ocp.CheckpointManager, step: int, like: Tree, log: Log, leave_out: str | None
) -> Restored:
    """One checkpoint; what cannot be read is tried again before it counts as such."""
    where = epath.Path(manager.directory) / str(step)
    ignore_late_callbacks()
    pauses = iter(RETRY_PAUSES_S)
    while True:
        try:
            return _read(manager, step, like, leave_out)
        except (CheckpointError, _DamagedError):
            raise
        except Exception as error:
            reason = unreadable(where, error)
            if reason is None:
                raise _DamagedError(first_line(error)) from error
            pause = next(pauses, None)
            if pause is None:
                raise StorageError(
                    f"{where} cannot be read ({reason}); nothing was moved: see to the storage, "
                    "then run the same command again"
                ) from error
            log(f"{where} cannot be read ({reason}); trying again in {pause:.0f} s")
            time.sleep(pause)


def _read(manager: ocp.CheckpointManager, step: int, like: Tree, leave_out: str | None) -> Restored:
    """One checkpoint, verified: its description, then each array, against their checksums."""
    where = f"{manager.directory}/{step}"
    meta = dict(manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta)
    written = meta.pop("checksum")
    if checksum(meta) != written:
        raise _DamagedError("its description has another checksum than when it was written")
    leaves, wanted = meta.get("leaves"), flatten(like)
    if not isinstance(leaves, Mapping) or not all(
        isinstance(x, list) and len(x) == 3 for x in leaves.values()
    ):
        raise CheckpointError(
            f"{where} was written by another version of dyntoken (its description has no list of arrays with "
            "checksums): go on with that version, or start from its weights (init.path) in another workdir"
        )
    here = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in wanted.items()}
    unread = {name for name in leaves if leave_out and name.startswith(f"{leave_out}/")}
    for name in sorted((leaves.keys() | here.keys()) - unread):
        there = leaves[name][:2] if name in leaves else "absent"
        if there != here.get(name, "absent"):
            raise CheckpointError(
                f"{where} holds another run: {name} is {there} there, {here.get(name, 'absent')} here; "
                "use another workdir (and init.path to start from its weights)"
            )
    item = flax.traverse_util.unflatten_dict(wanted, sep="/")
    args = ocp.args.StandardRestore(item)
    if unread:  # StandardRestore reads all or nothing, but is the only one after a StandardSave
        how = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
    tree = manager.restore(step, args=ocp.args.Composite(state=args)).state
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    for name, leaf in flat.items():
        if describe_leaf(_host(leaf)) != leaves[name]:
            raise _DamagedError(f"{name} has another checksum than when it was written")
    empty = flax.traverse_util.flatten_dict(
        flax.serialization.to_state_dict(like), sep="/", keep_empty_nodes=True
    )
    tree = flax.traverse_util.unflatten_dict(empty | flat, sep="/")
    return Restored(flax.serialization.from_state_dict(like, tree), {"step": step, **meta})


def _host(leaf: jax.Array) -> np.ndarray:
    """A copy of a whole array. What is written and what is summed up are these very bytes:
    on a CPU an array without a copy is a view, and the next step reuses the donated memory."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    elif isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        leaf = leaf.addressable_data(0)
    return np.array(leaf, order="C")


def describe_leaf(value: np.ndarray) -> list[Any]:
    """[shape, type, CRC-32] of an array."""
    return [
        list(value.shape),
        str(value.dtype),
        zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8)),
    ]


def unreadable(where: epath.Path, error: Exception) -> str | None:
    """Why a checkpoint could not be read; None if it can be, and is not what was written.

    TensorStore raises a ValueError for both, and words it as the storage did.
    So all of its files are read here.

    Args:
      where: folder of the step.
      error: what reading it raised.
    """
    missing = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    failing = (OSError, MemoryError, jax.errors.JaxRuntimeError)
    if isinstance(error, failing) and not isinstance(error, missing):
        return first_line(error)
    try:
        for file in paths.walk(where):
            with file.open("rb") as stream:
                while stream.read(2**24):
                    pass
    except missing:  # a part of it is gone
        return None
    except Exception as failed:  # of whatever library reads this kind of storage
        return first_line(failed)
    signs = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "PERMISSION_DENIED")
    return first_line(error) if str(error).startswith(signs) else None


def first_line(error: Exception) -> str:
    """What an error says, cut to one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def ignore_late_callbacks() -> None:
    """After a read that failed, TensorStore's threads answer to an event loop that Orbax has closed, and
    the other arrays' tasks and futures are collected with their errors unread: dozens of lines of stack
    trace around our one."""
    before = sys.unraisablehook
    if getattr(before, "quiet", False):
        return

    def of_a_reader(said: str) -> bool:
        ours = {"Task exception": "orbax", "Future exception": "tensorstore_spec"}
        return any(said.startswith(start) and sign in said for start, sign in ours.items())

    logging.getLogger("asyncio").addFilter(lambda record: not of_a_reader(record.getMessage()))

    def hook(event: Any) -> None:
        if str(event.exc_value) != "Event loop is closed":
            before(event)

    hook.quiet = True
    sys.unraisablehook = hook
