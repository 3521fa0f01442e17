"""Two real processes are one: same losses, same parameters, same ends."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from dyntoken import multihost, paths, train, weights
from dyntoken.train import loop
from dyntoken.train.build import Run, build
from dyntoken.train.state import init_variables
from tests.train.pair import care, config, everything, poisoned

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT_S = 300  # a hang is a failure


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def pair(tmp_path, *options, second=()):
    """Both processes and their output files; killed at the end whatever happens."""
    port, processes = str(free_port()), []
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    env = {**os.environ, "XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}
    outputs = [tmp_path / f"output{i}.txt" for i in range(2)]
    try:
        for i in range(2):
            command = [
                sys.executable,
                "-m",
                "tests.train.pair",
                port,
                str(i),
                str(tmp_path / "run"),
                *options,
            ]
            with outputs[i].open("w") as out:
                processes.append(
                    subprocess.Popen(
                        command + list(second if i else ()), cwd=ROOT, env=env, stdout=out, stderr=out
                    )
                )
        yield processes, outputs
    finally:
        for process in processes:
            process.kill()
            process.wait()


def finish(processes, outputs) -> list[str]:
    deadline = time.monotonic() + LIMIT_S
    for process in processes:
        process.wait(max(1.0, deadline - time.monotonic()))
    texts = [path.read_text() for path in outputs]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
    return texts


def rows(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_s", "data_wait")} for row in lines
    ]


def assert_close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), a, b)


def run_alone(chosen, workdir):
    """A run by one process on one device: (result, rows)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", functools.partial(build, devices=jax.devices()[:1]))
        result = train.run(chosen, workdir, log=[].append)
    assert result.run.mesh.size == 1
    return result, rows(workdir)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_alone(config(), tmp_path_factory.mktemp("alone"))


def assert_same_run(workdir, alone, again_config=None, steps=6, count=37):
    """What the workdir says and holds is what one device makes."""
    result, expected = alone
    found = rows(workdir)
    assert [(r["step"], r["kind"]) for r in found] == [(r["step"], r["kind"]) for r in expected]
    for here, there in zip(found, expected, strict=True):
        assert here.keys() == there.keys() and here.get("count") == there.get("count")
        for name, value in there.items():
            assert here[name] == value or here[name] == pytest.approx(value, abs=1e-5), name
    again = train.run(again_config or config(), workdir, log=[].append)
    assert int(again.state.step) == steps and again.metrics["count"] == count
    assert_close(again.state.params, result.state.params)
    assert_close(again.state.ema, result.state.ema)


@pytest.mark.thorough
def test_two_processes_train_and_evaluate_as_one(tmp_path, alone):
    with pair(tmp_path) as (processes, outputs):
        texts = finish(processes, outputs)
    assert all("mesh 4 count 37" in text for text in texts)
    assert "step 6/6" in texts[0] and "step 6/6" not in texts[1]  # one of them talks
    assert_same_run(tmp_path / "run", alone)
    assert not list((tmp_path / "run").glob(".probe*"))


@pytest.mark.slow
def test_two_processes_give_the_same_bits_twice(tmp_path):
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with pair(tmp_path / name) as (processes, outputs):
            finish(processes, outputs)
        state = train.run(config(), tmp_path / name / "run", log=[].append).state
        found.append((rows(tmp_path / name / "run"), jax.device_get(state)))
    assert found[0][0] == found[1][0]
    jax.tree.map(np.testing.assert_array_equal, found[0][1], found[1][1])


def wait_for_checkpoint(workdir, processes, outputs, step, said="step 4/6"):
    deadline = time.monotonic() + LIMIT_S
    while not ((workdir / "checkpoints" / str(step)).exists() and said in outputs[0].read_text()):
        assert all(process.poll() is None for process in processes), outputs[0].read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--pieces",)], ids=["whole", "pieces"])
def test_two_processes_killed_go_on_as_one(tmp_path, alone, options):
    with pair(tmp_path, "--hang=4", *options) as (processes, outputs):
        wait_for_checkpoint(tmp_path / "run", processes, outputs, 3)
        for process in processes:
            process.send_signal(signal.SIGKILL)
    lines = []
    resumed = train.run(config(), tmp_path / "run", log=lines.append)
    assert resumed.finished and "resuming at step 3 of 6" in lines
    assert_same_run(tmp_path / "run", alone)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Pieces of a photograph that matplotlib ships, JPEGs in a folder per class: 100 to train on, 30 to evaluate.

    Those with the richest patches: between flat ones rounding would decide which are kept.
    """
    pillow = pytest.importorskip("PIL.Image")
    cbook = pytest.importorskip("matplotlib.cbook")
    pytest.importorskip("tensorflow")
    root = tmp_path_factory.mktemp("images")

    def flattest(piece) -> float:
        small = np.asarray(piece.resize((16, 16))).astype(float)
        return min(small[y : y + 8, x : x + 8].std() for y in (0, 8) for x in (0, 8))

    with pillow.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as photo:
        places = [(left, top) for top in range(0, 540, 25) for left in range(0, 440, 25)]
        pieces = [photo.crop((left, top, left + 60 + left % 7, top + 50)) for left, top in places]
    for number, piece in enumerate(sorted(pieces, key=flattest, reverse=True)[:130]):
        folder = root / ("train" if number % 13 < 10 else "val") / str(number % 10)
        folder.mkdir(parents=True, exist_ok=True)
        piece.save(folder / f"{number}.jpg")
    save_decided(everything(root), f"{root}.safetensors")
    return root


def save_decided(chosen, path):
    """Fresh weights whose predictor has clear opinions: of scores that are alike, rounding would choose."""
    run = build(chosen)
    variables = init_variables(run.model, run.shape, run.settings.seed)
    louder = {name: 10.0 if "reducer" in name else 1.0 for name in flatten_dict(variables, sep="/")}
    scaled = {name: leaf * louder[name] for name, leaf in flatten_dict(variables, sep="/").items()}
    weights.save_weights(path, unflatten_dict(scaled, sep="/"))


@pytest.fixture(scope="module")
def everything_alone(images, tmp_path_factory):
    return run_alone(everything(images), tmp_path_factory.mktemp("everything"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_processes_are_one_with_all_augmentation_on_real_images(tmp_path, images, everything_alone):
    with pair(tmp_path, f"--images={images}") as (processes, outputs):
        finish(processes, outputs)
    assert_same_run(tmp_path / "run", everything_alone, everything(images), 20, 30)
    losses = [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert len(losses) == 20 and len(set(losses)) == 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_augmentation_survives_a_kill_and_another_number_of_processes(tmp_path, images, everything_alone):
    with pair(tmp_path, f"--images={images}", "--hang=9") as (processes, outputs):
        wait_for_checkpoint(tmp_path / "run", processes, outputs, 6, "step 9/20")
        for process in processes:
            process.send_signal(signal.SIGKILL)
    lines = []
    assert train.run(everything(images), tmp_path / "run", log=lines.append).finished
    assert "resuming at step 6 of 20" in lines
    assert_same_run(tmp_path / "run", everything_alone, everything(images), 20, 30)


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_two_processes_rewind_and_keep_the_best_as_one(tmp_path, monkeypatch):
    """Rows of the second process alone are not finite: both go back, and on, and keep the same."""
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_batches", poisoned(Run.train_batches))
        alone = run_alone(care(), tmp_path / "alone")
    with pair(tmp_path, "--care") as (processes, outputs):
        texts = finish(processes, outputs)
    assert "not finite at step 4" in texts[0] and "going back to step 2, rewind 1 of 1" in texts[0]
    kept = checkpoints(tmp_path / "run")
    scores = {row["step"]: row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "eval"}
    assert (
        kept == checkpoints(tmp_path / "alone") and min(scores, key=scores.get) in kept and len(scores) == 3
    )
    assert [row["more/count"] for row in rows(tmp_path / "run") if row["kind"] == "eval"] == [21] * 3
    assert_same_run(tmp_path / "run", alone, care())


@pytest.mark.slow
def test_a_notice_to_one_process_stops_both(tmp_path, alone):
    with pair(tmp_path) as (processes, outputs):
        deadline = time.monotonic() + LIMIT_S
        while not (tmp_path / "run" / "config.json").exists():  # connected, so it listens
            assert processes[1].poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
        texts = finish(processes, outputs)
    assert "stopped by a signal after step" in texts[0] and "step 6/6" not in texts[0]
    lines = []
    train.run(config(), tmp_path / "run", log=lines.append)
    assert any(line.startswith("resuming at step") for line in lines)
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_unequal_data_end_both_processes_before_training(tmp_path):
    with pair(tmp_path, second=("--train=60",)) as (processes, outputs):
        for process in processes:
            assert process.wait(LIMIT_S) == 1
        texts = [path.read_text() for path in outputs]
    assert all("is 64 on process 0, 60 on process 1" in text for text in texts)
    assert not (tmp_path / "run").exists()


def test_facts_that_differ_are_named():
    same = {"config.seed": 0, "the size of split 'train'": 64}
    multihost.check_equal([same, dict(same)])
    other = {**same, "the size of split 'train'": 63}
    with pytest.raises(multihost.HostError, match="split 'train' is 64 on process 0, 63 on process 2"):
        multihost.check_equal([same, same, other])


def test_weights_have_a_checksum():
    tree = {"a": np.arange(3.0), "b": np.ones((), np.int32)}
    assert multihost.digest(tree) == multihost.digest(dict(tree))
    assert multihost.digest(tree) != multihost.digest({**tree, "a": np.array([0.0, 1.0, 2.5])})


@pytest.mark.parametrize("where", ["/proc/dyntoken/run", "file/run"])
def test_a_workdir_that_cannot_be_written(where, tmp_path):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / where  # an absolute `where` replaces tmp_path
    with pytest.raises(paths.StorageError, match=r"cannot write to the workdir .*another --workdir"):
        train.run(config(), workdir, log=[].append)


def test_a_full_workdir_is_said_before_training(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 5 * 2**20, 5 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    multihost.check_workdir(epath.Path(tmp_path), need=4 * 2**20)
    with pytest.raises(paths.StorageError, match="5 MiB left, one checkpoint takes 6"):
        multihost.check_workdir(epath.Path(tmp_path), need=6 * 2**20)
    assert not list(tmp_path.iterdir())
