#!/usr/bin/env bash
# gcsfs 2026.10.1: a file on gs:// that is opened to append is overwritten; a UserWarning is all that is said.
#
# Expected: `open(path, "a")` adds to the end, or raises, as object stores cannot append.
# Seen: the object holds only what was written last. Through etils' epath (Path.open("a")), which uses gcsfs where
# TensorFlow is not installed, the same. A log that is appended to line by line keeps its last line.
#
# Runs against a local emulator of the storage service; needs no account and no network but the package index.
set -euo pipefail
folder=$(mktemp -d)
server=
trap '[ -n "$server" ] && kill "$server" 2>/dev/null; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  gcsfs==2026.10.1 fsspec==2026.9.0 'etils[epath]==1.15.0' gcp-storage-emulator==2026.7.19 2>/dev/null
port=$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$folder/venv/bin/gcp-storage-emulator" start --host=127.0.0.1 --port="$port" --in-memory --default-bucket=bucket \
  >/dev/null 2>&1 &
server=$!
export STORAGE_EMULATOR_HOST="http://127.0.0.1:$port" EPATH_USE_TF=0 NO_GCE_CHECK=true
"$folder/venv/bin/python" - "$port" <<'PY'
import importlib.metadata
import logging
import socket
import sys
import time
import warnings

for _ in range(100):
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[1])), 1).close()
        break
    except OSError:
        time.sleep(0.1)

logging.disable(logging.CRITICAL)  # no credentials here
import fsspec
from etils import epath

print("gcsfs", importlib.metadata.version("gcsfs"), "etils", importlib.metadata.version("etils"))
files = fsspec.filesystem("gs")
found = {}
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for name, opened in {
        "fsspec": lambda mode: files.open("bucket/a.txt", mode),
        "epath": lambda mode: epath.Path("gs://bucket/b.txt").open(mode),
    }.items():
        with opened("w") as file:
            file.write("first\n")
        with opened("a") as file:
            file.write("second\n")
        with opened("r") as file:
            found[name] = file.read()
print("after writing 'first' and appending 'second':", found)
print("warned:", sorted({str(one.message) for one in told if "Append" in str(one.message)}))
assert found == {"fsspec": "second\n", "epath": "second\n"}, "appending no longer overwrites"
print("holds: a file on gs:// that is opened to append loses what it held")
PY
