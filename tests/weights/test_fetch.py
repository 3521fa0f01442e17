"""Folders, shards, https and the hub as weight sources: a server on this machine plays the network."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from dyntoken.weights import WeightsError, fetch, files

TENSORS = {"norm.weight": np.arange(3, dtype=np.float32), "head.bias": np.ones(2, np.float32)}
INDEX = "model.safetensors.index.json"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the files of the server; what it was asked is remembered."""

    def do_GET(self):
        self.server.asked.append(self.path)
        body = self.server.files.get(self.path)
        self.send_response(200 if body is not None else 404)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:  # what huggingface_hub asks for, too
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body or b"") + self.server.missing))
        self.end_headers()
        if self.command == "GET" and body:
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """A web server; `files` maps a path to bytes, `missing` bytes are promised and never sent."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked, server.missing = {}, [], 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of downloads."""
    monkeypatch.setenv("DYNTOKEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(folder, tensors=TENSORS, name="model.safetensors"):
    """A safetensors file, and its bytes."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name, {"format": "pt"})
    return (folder / name).read_bytes()


def sharded(folder):
    """A checkpoint of two files."""
    for number, (key, value) in enumerate(TENSORS.items()):
        written(folder, {key: value}, f"model-{number}.safetensors")
    where = {key: f"model-{number}.safetensors" for number, key in enumerate(TENSORS)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def refusal(source, **options):
    """The one line that a source is refused with."""
    with pytest.raises(WeightsError) as error:
        files.local(source, **options) if options else files.read(source)
    text = str(error.value)
    assert text.isprintable(), text
    return text


def test_a_folder_and_a_sharded_one(tmp_path):
    written(tmp_path / "one")
    sharded(tmp_path / "two")
    for source in (tmp_path / "one", tmp_path / "two", tmp_path / "two" / INDEX):
        found = files.read(source).tensors
        assert found.keys() == TENSORS.keys()
        np.testing.assert_array_equal(found["norm.weight"], TENSORS["norm.weight"])


def test_shards_that_are_missing_cut_or_wrong(tmp_path):
    sharded(tmp_path)
    shard = tmp_path / "model-1.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    assert "model-1.safetensors: truncated or damaged" in refusal(tmp_path)
    shard.unlink()
    assert "its shard model-1.safetensors is missing" in refusal(tmp_path)
    written(tmp_path, {"other": np.ones(1, np.float32)}, "model-1.safetensors")
    assert "1 arrays are not in the shards that should hold them (head.bias in model-1" in refusal(tmp_path)
    for text in ("{}", "[]", "{", '{"weight_map": 3}'):
        (tmp_path / INDEX).write_text(text)
        assert "no index of a sharded checkpoint" in refusal(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    assert "names the shard '../../secret.safetensors'" in refusal(tmp_path)


def test_tied_arrays_are_there_under_every_name(tmp_path):
    """safetensors writes arrays that share memory once; the header, or nothing, names the others."""
    save_file({"a": TENSORS["norm.weight"]}, tmp_path / "model-0.safetensors", {"b": "a", "format": "pt"})
    where = dict.fromkeys(("a", "b"), "model-0.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    found = files.read(tmp_path).tensors
    np.testing.assert_array_equal(found["a"], found["b"])


@pytest.mark.parametrize("how", ["keyword", "fragment"])
def test_https_is_downloaded_once(server, cache, tmp_path, how):
    body = server.files["/a/model.safetensors"] = written(tmp_path / "source")
    digest = hashlib.sha256(body).hexdigest()
    url = f"{server.url}/a/model.safetensors"
    for _ in range(2):
        path = files.local(url, digest) if how == "keyword" else files.local(f"{url}#sha256={digest}")
    assert len(server.asked) == 1
    assert path.read_bytes() == body and [p.name for p in cache.iterdir()] == [path.name]
    assert files.read(f"{url}#sha256={digest.upper()}").tensors.keys() == TENSORS.keys()
    path.write_bytes(body[:-1])  # damaged on the disk
    files.local(url, digest)
    assert path.read_bytes() == body and len(server.asked) == 2


def test_https_that_is_not_what_was_meant(server, cache, tmp_path):
    server.files["/model.safetensors"] = written(tmp_path / "source")
    url = f"{server.url}/model.safetensors"
    for address in (url, f"{url}#sha256=12"):
        assert "without a checksum https:// is not read; give the file's" in refusal(address)
    assert not server.asked
    wrong = "0" * 64
    assert f"not {wrong}: another file than was meant" in refusal(f"{url}#sha256={wrong}")
    assert "could not be downloaded (HTTP Error 404" in refusal(f"{server.url}/none#sha256={wrong}")
    assert "give an https:// address" in refusal(f"http://example.org/w.safetensors#sha256={wrong}")
    assert "could not be downloaded" in refusal(f"http://127.0.0.1:1/w.safetensors#sha256={wrong}")
    assert not list(cache.iterdir())


class EntryNotFoundError(Exception):
    """As huggingface_hub's."""


class LocalEntryNotFoundError(EntryNotFoundError):
    """As huggingface_hub's."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for huggingface_hub over a folder; `asked` collects (repo, file, revision)."""
    asked = []

    def hf_hub_download(repo_id, filename, revision):
        asked.append((repo_id, filename, revision))
        if hub.error:
            raise hub.error
        if not (tmp_path / "hub" / filename).exists():
            raise EntryNotFoundError(filename)
        return str(tmp_path / "hub" / filename)

    hub = types.ModuleType("huggingface_hub")
    errors = types.ModuleType("huggingface_hub.errors")
    hub.hf_hub_download, hub.errors, hub.asked, hub.error = hf_hub_download, errors, asked, None
    errors.EntryNotFoundError, errors.LocalEntryNotFoundError = EntryNotFoundError, LocalEntryNotFoundError
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return hub


def test_the_hub_takes_the_first_file_that_there_is(hub, tmp_path):
    sharded(tmp_path / "hub")
    assert files.read("hf:org/name@v1").tensors.keys() == TENSORS.keys()
    names = ["model.safetensors", INDEX, "model-0.safetensors", "model-1.safetensors"]
    assert hub.asked == [("org/name", name, "v1") for name in names]
    hub.asked.clear()
    files.local("hf:org/name/model-0.safetensors", beside=("config.json",))
    assert hub.asked == [("org/name", name, None) for name in ("model-0.safetensors", "config.json")]


def test_the_hub_out_of_reach_or_without_the_file(hub):
    assert "the repository has no model.safetensors or" in refusal("hf:org/name")
    assert "the repository has no a.npz; name one of its files" in refusal("hf:org/name/a.npz")
    hub.error = LocalEntryNotFoundError("x")
    assert "model.safetensors is not in the local cache and the hub cannot be reached" in refusal(
        "hf:org/name"
    )
    hub.error = OSError("gated\nrepository")
    assert "hf:org/name: could not be downloaded (gated" in refusal("hf:org/name")


def test_the_real_client_of_the_hub(server, tmp_path):
    """Against a server on this machine, in a process of its own: it reads HF_ENDPOINT when it is imported."""
    pytest.importorskip("huggingface_hub")
    server.files["/org/name/resolve/main/model.safetensors"] = written(tmp_path / "source")
    server.files["/org/name/resolve/main/config.json"] = b"{}"
    code = (
        "import sys; from dyntoken.weights import files\n"
        "path = files.local('hf:org/name', beside=('config.json', 'preprocessor_config.json'))\n"
        "print(sorted(files.read('hf:org/name').tensors), path.with_name('config.json').exists())\n"
        "try: files.read('hf:org/name/absent.npz')\n"
        "except files.WeightsError as error: print(error)"
    )
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", code]
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(run, env=env | more, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        assert "['head.bias', 'norm.weight'] True" in done.stdout
    assert "absent.npz is not in the local cache" in done.stdout


def test_only_names_of_this_layout_are_weight_files(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert fetch.in_folder(tmp_path) is None
    assert "no finished checkpoint" in refusal(tmp_path)
