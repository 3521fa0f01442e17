#!/usr/bin/env bash
# safetensors 0.8.0, numpy interface: a transposed array is written as other numbers, without a word.
#
# Expected: `save` writes the values of what it is given (numpy's own save, savez and tobytes do), or raises as
# `safetensors.torch.save` does for a tensor that is not contiguous.
# Seen: the bytes in memory go out under the shape of the view: `x.T`, a slice with steps and a Fortran-ordered array
# (what np.transpose, np.linalg and PyTorch's `.numpy()` of a transposed weight give) come back as other arrays. The
# documentation asks for contiguous tensors; nothing checks. Who turns flax kernels ([in, out]) into torch's weights
# ([out, in]) by `.T` and saves them has a file of the right names and shapes that computes noise.
# Remedy: np.ascontiguousarray before saving.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import io

import numpy as np
import safetensors
import safetensors.numpy

print("safetensors", safetensors.__version__)
kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
views = {"kernel": kernel, "kernel.T": kernel.T, "kernel[:, ::2]": kernel[:, ::2], "Fortran": np.asfortranarray(kernel)}
right = {}
for name, view in views.items():
    back = safetensors.numpy.load(safetensors.numpy.save({"x": view}))["x"]
    stream = io.BytesIO()
    np.save(stream, view)
    assert np.array_equal(np.load(io.BytesIO(stream.getvalue())), view)
    copied = safetensors.numpy.load(safetensors.numpy.save({"x": np.ascontiguousarray(view)}))["x"]
    assert np.array_equal(copied, view)
    right[name] = bool(back.shape == view.shape and np.array_equal(back, view))
    print(f"{name}: saved {view.tolist()}, loaded {back.tolist()}{'' if right[name] else '   WRONG'}")
assert right == {"kernel": True, "kernel.T": False, "kernel[:, ::2]": False, "Fortran": False}, "it changed"
print("holds: safetensors.numpy.save writes views that are not C-contiguous as other numbers")
PY
