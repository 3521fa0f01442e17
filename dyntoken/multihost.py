"""Several processes as one program: which cluster this is, how to join it, and what they check together.

`detect` reads flags and the environment only, so a single host never waits for anybody. It knows
`--coordinator` (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), Slurm steps, Open MPI and
Cloud TPU; jax itself finds the addresses of the last three. Afterwards an error of one process is an error
of all, at once (`all_or_none`): a process that went on alone would wait within the first collective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.util
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from etils import epath

from dyntoken import paths, peers

T = TypeVar("T")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
MODES = ("auto", "on", "off")
SHUTDOWN_S = 60  # how long a process that ends waits for the others; past it the job is taken down
PROBE_BYTES = 2**20
SEEN_WITHIN_S = 30.0


class HostError(RuntimeError):
    """The processes do not find each other or cannot run together; one line that names one and the reason."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What is known of the processes of a program before they talk.

    Attributes:
      kind: "one", "flags", "slurm", "ompi" or "tpu".
      coordinator: `"HOST:PORT"` of process 0; None where jax finds it.
      processes: how many; None where jax asks the TPU.
      process: which one this is, from 0.
      sure: False where "auto" takes a machine with TPU chips for part of a pod,
        which only its metadata server can tell.
    """

    kind: str = "one"
    coordinator: str | None = None
    processes: int | None = 1
    process: int | None = 0
    sure: bool = True


def detect(
    mode: str = "auto",
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Cluster:
    """Which cluster this process belongs to; asks nobody.

    Args:
      mode: "auto", "on" (being alone is an error) or "off".
      coordinator: `"HOST:PORT"`, where process 0 listens.
      processes, process: how many there are, and which one this is; Slurm and
        Open MPI tell both if they are None.
      environ: by default that of this process.

    Raises:
      ValueError: for what does not fit together, or "on" without a cluster.
    """
    environ = os.environ if environ is None else environ
    if mode not in MODES:
        raise ValueError(f"--distributed={mode}: it is one of {', '.join(MODES)}")
    if mode == "off":
        if coordinator is not None:
            raise ValueError("--distributed=off and --coordinator exclude each other: leave one out")
        return Cluster()
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number(environ, "JAX_NUM_PROCESSES") if processes is None else processes
    process = _number(environ, "JAX_PROCESS_ID") if process is None else process
    kind, many, this = "one", None, None
    if "OMPI_COMM_WORLD_SIZE" in environ:
        kind, many, this = "ompi", *(_number(environ, f"OMPI_COMM_WORLD_{x}") for x in ("SIZE", "RANK"))
    elif all(name in environ for name in SLURM):
        kind, many, this = "slurm", *(_number(environ, f"SLURM_{x}") for x in ("NTASKS", "PROCID"))
    if coordinator:
        return _at(
            coordinator, many if processes is None else processes, this if process is None else process
        )
    if processes is not None or process is not None:
        raise ValueError("--processes and --process need --coordinator=HOST:PORT, where process 0 listens")
    if many is not None and many > 1:
        if kind == "ompi" and "OMPI_MCA_orte_hnp_uri" not in environ:  # since Open MPI 5
            raise ValueError(
                f"Open MPI started {many} processes but does not say where: give --coordinator=HOST:PORT "
                "with the host of rank 0, or --distributed=off"
            )
        return Cluster(kind, None, many, this)
    if _has_tpu(environ):
        hosts = max(len(environ.get(name, "").split(",")) for name in TPU_HOSTS)
        sure = mode == "on" or hosts > 1 or environ.get("MEGASCALE_NUM_SLICES", "1") != "1"
        return Cluster("tpu", None, None, None, sure)
    if mode == "on":
        raise ValueError(
            "--distributed=on, but neither Slurm, Open MPI nor a TPU pod started this process: "
            "give --coordinator=HOST:PORT --processes=N --process=I"
        )
    return Cluster()


def _at(coordinator: str, processes: int | None, process: int | None) -> Cluster:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator={coordinator} is not of the form HOST:PORT, as in node0:8476")
    if processes is None or process is None:
        raise ValueError(
            "--coordinator needs --processes=N and --process=I (from 0), which nothing else tells"
        )
    if not 0 <= process < processes:
        raise ValueError(f"--process={process} is not in 0..{processes - 1} (--processes={processes})")
    return Cluster("flags", coordinator, processes, process)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    if name not in environ:
        return None
    if not environ[name].isdigit():
        raise ValueError(f"{name}={environ[name]} in the environment is not a whole number")
    return int(environ[name])


def _has_tpu(environ: Mapping[str, str]) -> bool:
    """Whether jax would run on the TPU chips of this machine."""
    wanted = environ.get("JAX_PLATFORMS", "tpu").split(",")
    if "tpu" not in wanted or importlib.util.find_spec("libtpu") is None:
        return False
    return bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))


def initialize(cluster: Cluster, *, timeout: float = 300.0, lost_after: float = 30.0) -> None:
    """Connects this process to the others; must come before jax is used.

    From then on a process that is lost, or that ends with an error, ends the others with one line. Does
    nothing for a single process.

    Args:
      timeout: seconds to wait for the others.
      lost_after: seconds without a sign of life after which another one counts as lost.

    Raises:
      HostError: if they did not all come in time; jax cannot be used any more in this process.
      ValueError: what jax says of the addresses.
    """
    if cluster.kind == "one":
        return
    failure: list[Exception] = []

    def connect() -> None:
        import jax

        method = {"flags": "deactivate", "slurm": "slurm", "ompi": "ompi"}.get(cluster.kind)
        try:
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.processes,
                cluster.process,
                cluster_detection_method=method,
                initialization_timeout=int(timeout) + 600,
                heartbeat_timeout_seconds=int(lost_after) + SHUTDOWN_S,  # `peers` comes first
                shutdown_timeout_seconds=SHUTDOWN_S,
            )
        except Exception as error:  # raised below, in the caller's thread
            failure.append(error)

    # In a thread: jax's own timeout ends the process with a stack trace from C++.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        who = (
            "this process" if cluster.process is None else f"process {cluster.process} of {cluster.processes}"
        )
        where = f" at {cluster.coordinator}" if cluster.coordinator else ""
        raise HostError(
            f"{who} waited {timeout:g} s for the others{where}: start the same command for every process, "
            "process 0 on the coordinator's host, and open its port (--cluster_timeout waits longer)"
        )
    if failure and (cluster.sure or "coordinator_address" not in str(failure[0])):
        raise failure[0]
    if not failure:
        from jax._src.distributed import global_state as state  # the store has no public name

        if state.num_processes > 1:
            peers.watch(state.process_id, state.num_processes, state.client, lost_after=lost_after)


def all_or_none(make: Callable[[], T], facts: Callable[[T], Mapping[str, Any]] = lambda _: {}) -> T:
    """Calls a function on every process; all go on, or none does.

    Args:
      make: the same on every process; its result may hold more than `facts`.
      facts: name -> JSON value of what has to be equal.

    Raises:
      HostError: another process failed, or differs in a fact.
      Exception: what `make` raised in this process.
    """
    import jax

    if jax.process_count() == 1:
        return make()
    value, failure = None, None
    try:
        value = make()
        said = {"facts": json.loads(json.dumps(facts(value), default=str))}
    except Exception as error:  # raised again below, when the others know
        failure, said = error, {"error": " ".join(str(error).split()) or type(error).__name__}
    every = [json.loads(text) for text in _exchange(json.dumps(said))]
    if failure is not None:
        raise failure
    for process, other in enumerate(every):
        if "error" in other:
            raise HostError(f"process {process} cannot run: {other['error']}")
    check_equal([other["facts"] for other in every])
    return value


def check_equal(facts: list[dict[str, Any]]) -> None:
    """Raises `HostError` for the first fact that differs from that of process 0."""
    for process, other in enumerate(facts):
        for name in sorted(facts[0].keys() | other.keys()):
            first, here = facts[0].get(name), other.get(name)
            if first != here:
                raise HostError(
                    f"the hosts differ: {name} is {first} on process 0, {here} on process {process}; "
                    "give every host the same data and the same command"
                )


def _exchange(text: str) -> list[str]:
    """The texts of all processes, in order."""
    from jax.experimental import multihost_utils

    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([mine.size], np.int32)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, lengths, strict=True)]


def of_first(value: Any) -> Any:
    """A JSON value of process 0, on every process."""
    import jax

    text = json.dumps(value)
    return json.loads(text if jax.process_count() == 1 else _exchange(text)[0])


def only_first(log: Callable[[str], None]) -> Callable[[str], None]:
    """A log to which process 0 alone speaks."""
    import jax

    return log if jax.process_index() == 0 else lambda line: None


def digest(tree: Any) -> int:
    """CRC-32 of the arrays of a tree, in the order of its leaves."""
    import jax

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
      StorageError: read-only, full, or too full for a checkpoint.
      HostError: the same on another process, or each process has a folder of its own.
    """
    import jax

    index, count = jax.process_index(), jax.process_count()
    probes = [workdir / f".probe-{process}" for process in range(count)]

    def seen() -> None:
        deadline = time.monotonic() + SEEN_WITHIN_S  # network file systems may lag behind
        while missing := [process for process in range(count) if not probes[process].exists()]:
            if time.monotonic() > deadline:
                raise paths.StorageError(
                    f"process {index} does not see the files of process {missing[0]} in {workdir}: "
                    "give a --workdir that all hosts share (a network file system, or gs://)"
                )
            time.sleep(0.2)

    try:
        all_or_none(lambda: _probe(probes[index], need))
        if count > 1:
            all_or_none(seen)
    finally:
        with contextlib.suppress(OSError):
            probes[index].unlink(missing_ok=True)


def _probe(path: epath.Path, need: int) -> None:
    workdir = path.parent
    if str(workdir).startswith("gs://"):
        try:
            importlib.import_module("google.cloud.storage")
        except ImportError as error:  # Orbax would say so when it deletes the first old checkpoint
            raise paths.StorageError(
                f"the workdir {workdir} needs google-cloud-storage: `pip install google-cloud-storage`"
            ) from error
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(PROBE_BYTES))
        free = shutil.disk_usage(workdir).free if os.path.isdir(workdir) else need
    except Exception as error:  # a storage service raises errors of its own
        if not isinstance(error, OSError) and not paths.is_uri(workdir):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise paths.StorageError(
            f"cannot write to the workdir {workdir}: {reason}; free space there or give another --workdir"
        ) from error
    if free < need:
        raise paths.StorageError(
            f"the workdir {workdir} has {free / 2**20:.0f} MiB left, one checkpoint takes {need / 2**20:.0f}: "
            "free space there or give another --workdir"
        )
