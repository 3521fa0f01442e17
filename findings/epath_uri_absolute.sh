#!/usr/bin/env bash
# etils 1.15.0: epath.Path("gs://b/run").absolute() is a folder on the local disk; the local folder /gs/b is a bucket.
#
# Expected: a URI is absolute already (`is_absolute()` says so) and stays as it is, as with `resolve()` of other path
# libraries; a local path stays local.
# Seen: absolute() puts the working directory before it ("$PWD/gs:/b/run"), so what is written there is lost with the
# machine, without a word. And epath keeps URIs as /gs/..., /s3/..., /az/..., /hf/...: a mounted folder of such a name
# becomes gs://... .
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'etils[epath]==1.15.0' 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import os
import pathlib

from etils import epath

here = os.path.realpath(".")
print("etils", importlib.metadata.version("etils"))
uri = epath.Path("gs://bucket/run")
found = {
    "is_absolute": uri.is_absolute(),
    "absolute": str(uri.absolute()).replace(here, "$PWD"),
    "expanduser": str(uri.expanduser()),
    "local /gs/mount": str(epath.Path("/gs/mount")),
    "local /s3/mount": str(epath.Path(pathlib.Path("/s3/mount"))),
    "local /mnt/gs": str(epath.Path("/mnt/gs")),
}
print(found)
assert found == {
    "is_absolute": True,
    "absolute": "$PWD/gs:/bucket/run",
    "expanduser": "gs://bucket/run",
    "local /gs/mount": "gs://mount",
    "local /s3/mount": "s3://mount",
    "local /mnt/gs": "/mnt/gs",
}, "epath treats URIs otherwise now"
print("holds: absolute() turns a URI into a local folder, and local folders named /gs or /s3 are buckets")
PY
