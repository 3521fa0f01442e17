"""What several processes check together before a run costs anything.

An error of one process is an error of all, at once: a process that went on
alone would wait for the others within the first collective.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from dyntoken import paths

T = TypeVar("T")
PROBE_BYTES = 2**20
SEEN_WITHIN_S = 30.0


class HostError(RuntimeError):
    """The processes cannot run together; the message names one and the reason."""


class WorkdirError(OSError):
    """Nothing can be written where the run should leave its files."""


def agree(make: Callable[[], T], facts: Callable[[T], Mapping[str, Any]] = lambda _: {}) -> T:
    """Calls a function on every process; all go on, or none does.

    Args:
      make: the same on every process; its result may hold more than `facts`.
      facts: name -> JSON value of what has to be equal.

    Raises:
      HostError: another process failed, or differs in a fact.
      Exception: what `make` raised in this process.
    """
    if jax.process_count() == 1:
        return make()
    value, failure = None, None
    try:
        value = make()
        said = {"facts": json.loads(json.dumps(facts(value), default=str))}
    except Exception as error:  # raised again below, when the others know
        failure, said = error, {"error": " ".join(str(error).split()) or type(error).__name__}
    every = [json.loads(text) for text in exchange(json.dumps(said))]
    if failure is not None:
        raise failure
    for process, other in enumerate(every):
        if "error" in other:
            raise HostError(f"process {process} cannot run: {other['error']}")
    _compare([other["facts"] for other in every])
    return value


def _compare(every: list[dict[str, Any]]) -> None:
    for process, other in enumerate(every):
        for name in sorted(every[0].keys() | other.keys()):
            first, here = every[0].get(name), other.get(name)
            if first != here:
                raise HostError(
                    f"the hosts differ: {name} is {first} on process 0, {here} on process {process}; "
                    "give every host the same data and the same command"
                )


def exchange(text: str) -> list[str]:
    """The texts of all processes, in order."""
    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([mine.size], np.int32)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, lengths, strict=True)]


def of_first(text: str) -> str:
    """The text of process 0, on every process."""
    return text if jax.process_count() == 1 else exchange(text)[0]


def digest(tree: Any) -> int:
    """CRC-32 of the arrays of a tree, in the order of its leaves."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), total)
    return total


def check_workdir(workdir: epath.Path, *, need: int) -> None:
    """Makes the folder of a run, and makes sure that every process can write there.

    Args:
      workdir: shared by all processes; may be on `gs://`.
      need: bytes of one checkpoint.

    Raises:
      WorkdirError: read-only, full, or too full for a checkpoint.
      HostError: the same on another process, or each process has a folder of its own.
    """
    index, count = jax.process_index(), jax.process_count()
    probes = [workdir / f".probe-{process}" for process in range(count)]

    def seen() -> None:
        deadline = time.monotonic() + SEEN_WITHIN_S  # network file systems may lag behind
        while missing := [process for process in range(count) if not probes[process].exists()]:
            if time.monotonic() > deadline:
                raise WorkdirError(
                    f"process {index} does not see the files of process {missing[0]} in {workdir}: "
                    "give a --workdir that all hosts share (a network file system, or gs://)"
                )
            time.sleep(0.2)

    try:
        agree(lambda: _probe(probes[index], need))
        if count > 1:
            agree(seen)
    finally:
        with contextlib.suppress(OSError):
            probes[index].unlink(missing_ok=True)


def _probe(path: epath.Path, need: int) -> None:
    workdir = path.parent
    if str(workdir).startswith("gs://"):
        try:
            importlib.import_module("google.cloud.storage")
        except ImportError as error:  # Orbax would say so when it deletes the first old checkpoint
            raise WorkdirError(
                f"the workdir {workdir} needs google-cloud-storage: `pip install google-cloud-storage`"
            ) from error
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(PROBE_BYTES))
        local = os.path.isdir(workdir)
        free = shutil.disk_usage(workdir).free if local else need
    except Exception as error:  # a storage service raises errors of its own
        if not isinstance(error, OSError) and not paths.is_uri(workdir):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise WorkdirError(
            f"cannot write to the workdir {workdir}: {reason}; free space there or give another --workdir"
        ) from error
    if free < need:
        raise WorkdirError(
            f"the workdir {workdir} has {free / 2**20:.0f} MiB left, one checkpoint takes {need / 2**20:.0f}: "
            "free space there or give another --workdir"
        )
