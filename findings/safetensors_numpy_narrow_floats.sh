#!/bin/bash
# safetensors 0.8.0, numpy interface, with ml_dtypes 0.5.4.
# Expected: `safetensors.numpy.load` reads what `safetensors.numpy.save` wrote, and valid files of other writers.
# Seen: `save` takes bfloat16 and float8 arrays and writes valid files; `load` ends in a bare KeyError ('BF16',
# 'F8_E4M3', 'F8_E5M2'), no SafetensorError, so that a reader which catches the library's own error lets it through
# or calls a whole file damaged. `safetensors.deserialize` gives the bytes, type and shape: read those.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.5.4
"$place/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

assert safetensors.__version__ == "0.8.0"
for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
    array = np.array([1.5, -2.0], getattr(ml_dtypes, name))
    data = safetensors.numpy.save({"x": array})
    (_, entry), = safetensors.deserialize(data)
    back = np.frombuffer(entry["data"], array.dtype).reshape(entry["shape"])
    assert (back == array).all()
    try:
        safetensors.numpy.load(data)
    except KeyError as error:
        print(f"{name}: saved as {entry['dtype']}, load: KeyError {error}")
    else:
        raise SystemExit(f"{name}: load reads it now")
print("holds: safetensors 0.8.0 writes bfloat16 and float8 from numpy, and cannot load them into it")
PY
