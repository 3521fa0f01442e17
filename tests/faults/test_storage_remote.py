"""`gs://` is `gs://` everywhere: a run on a stand-in for a storage service, killed, resumed, evaluated."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from dyntoken import data, paths, train
from dyntoken.checkpoints import folder, restore_from
from dyntoken.data.folder import open_folder
from dyntoken.train import logging as report
from dyntoken.weights import WeightsError, files
from dyntoken.workdirs import CheckpointError
from tests.faults.bucket_run import CONFIG
from tests.train.test_kill import rows
from tests.train.test_loop import Log
from tests.train.tiny import tiny_config

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def answering(monkeypatch):
    """A network on which every bucket is there."""
    monkeypatch.setattr(paths, "_check_answers", lambda uri: None)


@pytest.mark.parametrize("uri", ["gs://b/run", "s3://b/x/y", "az://b/x", "hf://org/name/x", "gs://b"])
def test_a_uri_stays_one(answering, uri):
    assert str(paths.resolve(uri)) == uri == str(paths.resolve(epath.Path(uri)))
    assert str(folder(uri)) == f"{uri}/checkpoints"


def test_a_local_path_is_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    found = {path: str(paths.resolve(path)) for path in ("runs/x", "~/runs", "/a/b", ".")}
    assert found == {
        "runs/x": f"{tmp_path}/runs/x",
        "~/runs": "/home/someone/runs",
        "/a/b": "/a/b",
        ".": str(tmp_path),
    }


@pytest.mark.parametrize("path", ["/gs/bucket/run", "/s3/data", "/hf/models/x"])
def test_a_local_folder_that_epath_takes_for_a_bucket(path):
    with pytest.raises(ValueError, match=rf"^{path}: .*bucket"):
        paths.resolve(path)


@pytest.mark.parametrize("data_dir", [None, "/data", "gs://b/data"])
def test_folders_of_images(answering, data_dir):
    assert open_folder("folder:gs://b/images", data_dir)._root == "gs://b/images"
    assert open_folder("folder:/abs/images", data_dir)._root == "/abs/images"
    relative = open_folder("folder:images", data_dir)._root
    assert relative == (f"{data_dir}/images" if data_dir else "images")


UNREAD = (
    "https://storage.googleapis.com/b/run",
    "http://host/x",
    "file:///tmp/x",
    "ftp://host/x",
    "gcs://b/run",
)


@pytest.mark.parametrize("uri", UNREAD)
@pytest.mark.parametrize("use", ["train", "evaluate", "open", "data", "folder", "weights", "resume"])
def test_a_uri_of_another_kind_is_refused_at_once(uri, use, tmp_path):
    uses = {
        "train": lambda: train.run(tiny_config(), uri, log=Log()),
        "evaluate": lambda: train.evaluate(tiny_config(), uri, log=Log()),
        "open": lambda: train.open_workdir(uri),
        "data": lambda: data.info("cifar10", uri),
        "folder": lambda: data.info(f"folder:{uri}"),
        "weights": lambda: files.read(uri),
        "resume": lambda: restore_from(uri, None),
    }
    began = time.monotonic()
    with pytest.raises((ValueError, CheckpointError), match=r"://.* is not read; .*gs://") as caught:
        uses[use]()
    assert "\n" not in str(caught.value) and time.monotonic() - began < 10
    assert not os.path.exists(uri.split("//")[0])


class Silent:
    """A storage service that does not answer."""

    def exists(self, path):
        threading.Event().wait(3)
        return False


class Failing:
    def exists(self, path):
        raise RuntimeError(f"when reading {path}:\n\tCould not resolve host")


@pytest.mark.parametrize(
    ("service", "reason"), [(Silent, "does not answer within"), (Failing, "Could not resolve host")]
)
@pytest.mark.parametrize("uri", ["gs://bucket-x/run", "s3://bucket-x/run"])
def test_without_network_it_ends_soon(monkeypatch, service, reason, uri):
    monkeypatch.setattr(paths, "ANSWERS_WITHIN_S", 0.2)
    monkeypatch.setattr(type(epath.Path("gs://b")), "_backend", property(lambda self: service()))
    for use in (lambda: train.run(tiny_config(), uri, log=Log()), lambda: files.read(uri)):
        with pytest.raises((ValueError, WeightsError), match=rf"^{uri} .*{reason}.*network") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_what_deleting_needs_is_asked_for_before_the_run(answering, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(OSError, match=r"gs://bucket-x/run needs .*pip install google-cloud-storage"):
        train.run(tiny_config(), "gs://bucket-x/run", log=Log())


def test_nothing_is_appended_to_an_object(tmp_path, monkeypatch):
    """gcsfs warns and overwrites, others raise."""
    real = epath.Path("x").__class__.open

    def no_append(self, mode="r", **options):
        assert "a" not in mode
        return real(self, mode, **options)

    monkeypatch.setattr(report.paths, "is_uri", lambda path: True)
    monkeypatch.setattr(epath.Path("x").__class__, "open", no_append)
    one = report.Report(epath.Path(tmp_path), total=4, log=lambda line: None)
    one.eval(1, {"top1": 0.5})
    one.write(2, "train", {"ce": 1.0})  # not written yet
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    one.eval(3, {"top1": 0.6})
    one.write(4, "train", {"ce": 1.0})
    assert [row["step"] for row in one.rows()] == [1, 2, 3, 4]
    again = report.Report(epath.Path(tmp_path), total=4, log=lambda line: None)
    again.resume(2, {})
    again.write(3, "train", {"ce": 2.0})
    again.close()
    assert [row["step"] for row in again.rows()] == [1, 2, 3]


@pytest.fixture
def server(tmp_path):
    """(folder, port) of the stand-in, in a process of its own: it outlives the runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "stored" / "bucket").mkdir(parents=True)
    serving = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.bucket", str(tmp_path / "stored"), str(port)], cwd=ROOT
    )
    try:
        yield tmp_path / "stored", port
    finally:
        serving.kill()
        serving.wait()


def start(server, what: str, cwd: pathlib.Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "tests.faults.bucket_run", str(server[0]), str(server[1]), what]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (cwd / "output.txt").open("a") as output:
        return subprocess.Popen(words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=output, text=True)


def finish(server, what: str, cwd: pathlib.Path) -> str:
    out, _ = start(server, what, cwd).communicate(timeout=300)
    return out


@pytest.mark.thorough
def test_its_parts_on_a_storage_service(server, tmp_path):
    """Old checkpoints are deleted, a damaged one and an old run are moved, the lock is released."""
    cwd = tmp_path / "here"
    cwd.mkdir()
    said = finish(server, "parts", cwd)
    assert said, (cwd / "output.txt").read_text()
    found = json.loads(said.splitlines()[-1])
    names = found.pop("names")
    assert len(names) == 2 and names[0].startswith("lock-") and names[1] == "old"
    old = [f"old/1/{name}" for name in ("checkpoints", "damaged", "metrics.jsonl")]
    assert found == {"step": 2, "old": old, "rows": 1}
    where = server[0] / "bucket" / "parts"
    assert [path.name for path in where.iterdir()] == ["old"]
    kept = {path.parts[-2] for path in (where / "old" / "1").glob("*/*/commit_success.txt")}
    assert kept == {"2", "3"} and [path.name for path in cwd.iterdir()] == ["output.txt"]


@pytest.mark.slow
def test_a_run_on_a_storage_service(server, tmp_path):
    """Killed twice, the second time while it saves; the same as on a local disk; nothing beside the bucket."""
    cwd = tmp_path / "here"
    cwd.mkdir()
    where = server[0] / "bucket" / "runs" / "one"

    def complete() -> list[int]:
        done = (where / "checkpoints").glob("*/commit_success.txt")
        return sorted(int(path.parent.name) for path in done)

    for step in (9, 30):
        run = start(server, "train", cwd)
        while max(complete(), default=0) < step:
            assert run.poll() is None, (cwd / "output.txt").read_text()
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert len(list(where.glob("lock-*.json"))) == 1
    said = finish(server, "train", cwd)
    assert "resuming at step" in said and "run that is gone" in said, (cwd / "output.txt").read_text()
    assert list(where.glob("lock-*.json")) == []

    local = tmp_path / "local"
    train.run(CONFIG, local, log=Log())
    assert rows(where) == rows(local)
    assert complete() == sorted(int(path.name) for path in (local / "checkpoints").iterdir())
    meta = pathlib.Path("checkpoints") / "60" / "meta" / "metadata"
    written, wanted = (json.loads((run / meta).read_text()) for run in (where, local))
    for key in ("leaves", "scores", "config"):
        assert written[key] == wanted[key]

    best = restore_from(local, train.build(CONFIG).abstract_state, step="best").step
    found = json.loads(finish(server, "evaluate", cwd).splitlines()[-1])
    assert found == {"best": best, "opened": 60}
    for path in (where / "checkpoints").glob("*/meta/metadata"):
        path.write_bytes(path.read_bytes()[:100])
    assert "resuming" not in finish(server, "train", cwd)
    assert "--restart" in (cwd / "output.txt").read_text().splitlines()[-1]
    assert "gs://bucket/runs/one/old/1" in finish(server, "restart", cwd)
    assert rows(where) == rows(local) == rows(where / "old" / "1")
    assert [path.name for path in cwd.iterdir()] == ["output.txt"]
