"""Which cluster a process belongs to, by flags and environment; nobody is asked."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import time

import pytest

from dyntoken import multihost
from dyntoken.multihost import Cluster, detect

ROOT = pathlib.Path(__file__).resolve().parent.parent
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
PLAIN = {"JAX_COORDINATOR_ADDRESS": "node0:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, Cluster()),
        (SLURM, Cluster("slurm", None, 4, 3)),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Cluster()),
        ({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, Cluster()),  # sbatch without srun
        ({**OMPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:34911"}, Cluster("ompi", None, 2, 1)),
        ({**OMPI, "OMPI_COMM_WORLD_SIZE": "1"}, Cluster()),
        (PLAIN, Cluster("flags", "node0:8476", 2, 0)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, Cluster()),
    ],
)
def test_auto_reads_the_environment(environ, found):
    assert detect(environ=environ) == found
    assert detect("off", environ=environ) == Cluster()


def test_flags_win_and_a_launcher_fills_in():
    given = detect(coordinator="a:1", processes=8, process=7, environ={**PLAIN, **SLURM})
    assert given == Cluster("flags", "a:1", 8, 7)
    assert detect(coordinator="a:1", environ=SLURM) == Cluster("flags", "a:1", 4, 3)
    assert detect(coordinator="a:1", environ=OMPI) == Cluster("flags", "a:1", 2, 1)


def test_a_pod_is_recognised_by_its_chips(monkeypatch):
    monkeypatch.setattr(multihost.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(multihost.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    assert detect(environ={"JAX_PLATFORMS": "cpu"}) == Cluster()
    assert detect(environ={}) == Cluster("tpu", None, None, None, sure=False)
    assert detect(environ={"TPU_WORKER_HOSTNAMES": "a"}).sure is False
    assert detect(environ={"TPU_WORKER_HOSTNAMES": "a,b"}).sure is True
    assert detect("on", environ={}).sure is True


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"mode": "on"}, {}, "give --coordinator=HOST:PORT --processes=N --process=I"),
        ({"mode": "off", "coordinator": "a:1"}, {}, "exclude each other"),
        ({"mode": "yes"}, {}, "auto, on, off"),
        ({"processes": 2}, {}, "need --coordinator"),
        ({"coordinator": "a:1"}, {}, "needs --processes=N and --process=I"),
        ({"coordinator": "a", "processes": 2, "process": 0}, {}, "HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, {}, r"not in 0\.\.1"),
        ({}, OMPI, "give --coordinator=HOST:PORT"),
        ({}, {**PLAIN, "JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID=one"),
    ],
)
def test_what_does_not_fit_says_what_to_give(flags, environ, message):
    with pytest.raises(ValueError, match=message):
        detect(**flags, environ=environ)


def test_an_unreachable_coordinator_ends_in_one_line_in_time():
    began = time.monotonic()
    flags = ["--coordinator=localhost:1", "--processes=2", "--process=1", "--cluster_timeout=2"]
    done = subprocess.run(
        [sys.executable, "-m", "dyntoken.main", "--config=configs/tps_deit.py:tiny", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and time.monotonic() - began > 2
    assert done.stderr.startswith("error: process 1 of 2 waited 2 s for the others at localhost:1: ")
