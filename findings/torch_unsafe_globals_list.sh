#!/bin/bash
# torch 2.13.0: a checkpoint with a numpy scalar beside the weights ({"acc": np.float64(0.5)}, as many trainers write).
# Expected: allowing exactly what `torch.serialization.get_unsafe_globals_in_checkpoint` lists makes
# `torch.load(weights_only=True)` read the file; that is what its documentation offers it for.
# Seen: it lists `scalar` and `numpy.dtype`; with these allowed, loading still raises UnpicklingError for
# `numpy.dtypes.Float64DType`, the class of the dtype object, which no part of the file names. For a file in the
# legacy form (no zip) the list is not given at all: ValueError.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$place"
"$place/venv/bin/python" - <<'PY'
import importlib
import pickle

import numpy as np
import torch

assert torch.__version__.split("+")[0] == "2.13.0"
torch.save({"model": {"x": torch.ones(1)}, "acc": np.float64(0.5)}, "zip.pth")
names = torch.serialization.get_unsafe_globals_in_checkpoint("zip.pth")
print("listed:", names)
listed = [getattr(importlib.import_module(m), n) for m, _, n in (name.rpartition(".") for name in names)]
try:
    with torch.serialization.safe_globals(listed):
        torch.load("zip.pth", weights_only=True)
except pickle.UnpicklingError as error:
    assert "numpy.dtypes.Float64DType" in str(error)
    print("with these allowed: refused for numpy.dtypes.Float64DType")
else:
    raise SystemExit("the list is enough now")
with torch.serialization.safe_globals([*listed, np.dtypes.Float64DType]):
    assert torch.load("zip.pth", weights_only=True)["acc"] == 0.5
torch.save({"acc": np.float64(0.5)}, "legacy.pth", _use_new_zipfile_serialization=False)
try:
    torch.serialization.get_unsafe_globals_in_checkpoint("legacy.pth")
except ValueError as error:
    print("legacy form:", error)
else:
    raise SystemExit("the legacy form is listed now")
print("holds: get_unsafe_globals_in_checkpoint does not name all that weights_only needs")
PY
