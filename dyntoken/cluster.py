"""Several processes as one program: which cluster this is, and how to join it.

`find` reads flags and the environment only, so a single host never waits for
anybody. What it knows: `--coordinator` (or JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES, JAX_PROCESS_ID), Slurm steps, Open MPI and Cloud TPU; jax
itself finds the addresses of the last three. CPU processes talk by gloo, jax's
default.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import os
import threading
from collections.abc import Mapping

from dyntoken import peers

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
MODES = ("auto", "on", "off")
# How long a process that ends waits for the others; past it the job is taken down.
SHUTDOWN_S = 60


class ClusterError(RuntimeError):
    """The processes did not find each other; jax cannot be used any more in this one."""


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


def find(
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
    kind, many, this = _launcher(environ)
    if coordinator:
        return _plain(
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
    if _tpu(environ):
        hosts = max(len(environ.get(name, "").split(",")) for name in TPU_HOSTS)
        sure = mode == "on" or hosts > 1 or environ.get("MEGASCALE_NUM_SLICES", "1") != "1"
        return Cluster("tpu", None, None, None, sure)
    if mode == "on":
        raise ValueError(
            "--distributed=on, but neither Slurm, Open MPI nor a TPU pod started this process: "
            "give --coordinator=HOST:PORT --processes=N --process=I"
        )
    return Cluster()


def join(cluster: Cluster, *, timeout: float = 300.0, lost_after: float = 30.0) -> None:
    """Connects this process to the others; must come before jax is used.

    From then on a process that is lost, or that ends with an error, ends the others with one line. Does
    nothing for a single process.

    Args:
      cluster: from `find`.
      timeout: seconds to wait for the others.
      lost_after: seconds without a sign of life after which another one counts as lost.

    Raises:
      ClusterError: if they did not all come in time.
      ValueError: what jax says of the addresses.
    """
    if cluster.kind == "one":
        return
    failure: list[Exception] = []
    # By way of a thread: jax's own timeout ends the process with a stack trace from C++.
    thread = threading.Thread(
        target=_connect, args=(cluster, timeout + 600, lost_after, failure), daemon=True
    )
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        who = (
            "this process" if cluster.process is None else f"process {cluster.process} of {cluster.processes}"
        )
        where = f" at {cluster.coordinator}" if cluster.coordinator else ""
        raise ClusterError(
            f"{who} waited {timeout:g} s for the others{where}: start the same command for every process, "
            "process 0 on the coordinator's host, and open its port (--cluster_timeout waits longer)"
        )
    if failure and (cluster.sure or "coordinator_address" not in str(failure[0])):
        raise failure[0]
    if not failure:
        from jax._src.distributed import global_state as state  # the store has no public name

        if state.num_processes > 1:
            peers.watch(state.process_id, state.num_processes, state.client, lost_after=lost_after)


def _connect(cluster: Cluster, timeout: float, lost_after: float, failure: list[Exception]) -> None:
    import jax

    method = {"flags": "deactivate", "slurm": "slurm", "ompi": "ompi"}.get(cluster.kind)
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            cluster_detection_method=method,
            initialization_timeout=int(timeout),
            heartbeat_timeout_seconds=int(lost_after) + SHUTDOWN_S,  # ours comes first
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except Exception as error:  # handed to the caller's thread
        failure.append(error)


def _plain(coordinator: str, processes: int | None, process: int | None) -> Cluster:
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


def _launcher(environ: Mapping[str, str]) -> tuple[str, int | None, int | None]:
    """(kind, processes, process) of the launcher that started this process."""
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return "ompi", _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_RANK")
    if all(name in environ for name in SLURM):
        return "slurm", _number(environ, "SLURM_NTASKS"), _number(environ, "SLURM_PROCID")
    return "one", None, None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    if name not in environ:
        return None
    if not environ[name].isdigit():
        raise ValueError(f"{name}={environ[name]} in the environment is not a whole number")
    return int(environ[name])


def _tpu(environ: Mapping[str, str]) -> bool:
    """Whether jax would run on the TPU chips of this machine."""
    wanted = environ.get("JAX_PLATFORMS", "tpu").split(",")
    if "tpu" not in wanted or importlib.util.find_spec("libtpu") is None:
        return False
    return bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))
