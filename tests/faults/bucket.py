"""A storage service `gs://` that is a folder: for TensorStore over HTTP, for epath as a backend.

It keeps to what an object store promises, and no more: an object is written as a
whole, nothing can be appended, a folder is a common prefix and moving one is
copying and deleting. Not covered: credentials, buckets with real folders, and
what TensorFlow or gcsfs do of their own.

    python -m tests.faults.bucket FOLDER PORT

serves; `install(FOLDER, PORT)` makes `gs://` in this process mean it.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import pathlib
import sys
import types
import urllib.parse


class Handler(http.server.BaseHTTPRequestHandler):
    """The part of the JSON API that TensorStore uses."""

    protocol_version = "HTTP/1.1"
    root: pathlib.Path

    def log_message(self, *_: object) -> None:
        pass

    def _object(self) -> tuple[pathlib.Path, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        bucket, _, rest = url.path.partition("/b/")[2].partition("/o")
        return self.root / bucket / urllib.parse.unquote(query.get("name", rest.lstrip("/"))), query

    def _answer(self, status: int, body: bytes = b"", generation: str = "0", part: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-goog-generation", generation)
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path, query = self._object()
        if "alt" not in query:
            prefix, bucket = query.get("prefix", ""), path
            names = [str(p.relative_to(bucket)) for p in bucket.rglob("*") if p.is_file()]
            items = [{"name": name, "size": "1"} for name in sorted(names) if name.startswith(prefix)]
            self._answer(200, json.dumps({"items": items}).encode())
            return
        try:
            data, generation = path.read_bytes(), str(path.stat().st_mtime_ns)
        except (FileNotFoundError, IsADirectoryError):
            self._answer(404)
            return
        if spec := self.headers.get("Range"):
            first, _, last = spec.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(len(data), int(last) + 1) if first and last else len(data)
            self._answer(206, data[start:stop], generation, f"bytes {start}-{stop - 1}/{len(data)}")
            return
        self._answer(200, data, generation)

    def do_POST(self) -> None:
        path, query = self._object()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if query.get("ifGenerationMatch") == "0" and path.exists():
            self._answer(412)
            return
        write(path, data)
        about = {"name": query["name"], "bucket": path.parts[len(self.root.parts)], "size": str(len(data))}
        about |= {"generation": str(path.stat().st_mtime_ns), "metageneration": "1"}
        times = dict.fromkeys(("timeCreated", "updated", "timeStorageClassUpdated"), "2026-01-01T00:00:00Z")
        self._answer(200, json.dumps(about | times).encode())

    def do_DELETE(self) -> None:
        path, _ = self._object()
        path.unlink(missing_ok=True)
        self._answer(204)


def write(path: pathlib.Path, data: bytes) -> None:
    """An object appears as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    draft.replace(path)


class _Upload(io.BytesIO):
    def __init__(self, path: pathlib.Path):
        super().__init__()
        self._path = path

    def close(self) -> None:
        if not self.closed:
            write(self._path, self.getvalue())
        super().close()


def install(folder: str | os.PathLike[str], port: int) -> None:
    """Before epath meets its first `gs://`."""
    os.environ["EPATH_USE_TF"] = "0"
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{port}"
    from etils.epath import backend, gpath

    root = pathlib.Path(folder)

    class Bucket(backend._OsPathBackend):
        """epath's own local backend on the folder; with what differs."""

        def open(self, path, mode):
            if "a" in mode:
                raise OSError(f"{path}: nothing can be appended")
            if "w" not in mode:
                return super().open(place(path), mode)
            upload = _Upload(place(path))
            return upload if "b" in mode else io.TextIOWrapper(upload, "utf-8")

        def rename(self, path, dst):
            raise FileNotFoundError(
                f"the folder of {dst} does not exist"
            )  # as fsspec's, where it holds nothing

        def replace(self, path, dst):
            write(place(dst), place(path).read_bytes())
            place(path).unlink()

        def copy(self, path, dst, overwrite):
            write(place(dst), place(path).read_bytes())

        def listdir(self, path):
            return [name for name in super().listdir(place(path)) if not name.startswith(".")]

        def glob(self, path):
            return [
                f"gs://{pathlib.Path(found).relative_to(root)}" for found in super().glob(str(place(path)))
            ]

        def walk(self, top, **options):
            for where, folders, files in super().walk(place(top), **options):
                yield f"gs://{pathlib.Path(where).relative_to(root)}", folders, files

    def place(path) -> pathlib.Path:
        return root / os.fspath(path).removeprefix("gs://")

    def on_folder(name):
        real = getattr(backend._OsPathBackend, name)
        return lambda self, path, *args, **kwargs: real(self, place(path), *args, **kwargs)

    for name in ("exists", "isdir", "makedirs", "mkdir", "rmtree", "remove", "stat"):
        setattr(Bucket, name, on_folder(name))
    gpath._PREFIX_TO_BACKEND["gs"] = Bucket()
    # Orbax asks Google's client whether the bucket has real folders.
    storage = types.ModuleType("google.cloud.storage")
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: types.SimpleNamespace(name=name))
    with contextlib.suppress(ImportError):
        import google.cloud  # noqa: F401
    cloud = sys.modules.setdefault("google.cloud", types.ModuleType("google.cloud"))
    cloud.storage = sys.modules["google.cloud.storage"] = storage


def serve(folder: str, port: int) -> None:
    """Until the process is ended."""
    Handler.root = pathlib.Path(folder)
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
