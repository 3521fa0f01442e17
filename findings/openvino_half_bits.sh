#!/bin/sh
# OpenVINO's Python API takes the bits of a float16 array for those of a bfloat16 input.
#
# Expected: the values are converted, as they are for float32, float16 and integer inputs, or the array is refused.
# Seen with openvino 2026.4.1 (numpy 2.4.6, ml_dtypes 0.6.0): of a bfloat16 input, 1.0 in float16 arrives as
# 0.0078125 and 100.0 as 5.3e13, without a word; float32 and float64 arrays end in an error about shapes;
# bfloat16 of ml_dtypes is right. A float32 or float16 input converts every type by value.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 openvino==2026.4.1 numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/pip" uninstall --quiet --yes openvino-telemetry
"$folder/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np
import openvino
from onnx import TensorProto, helper

VALUES = np.array([1.0, 2.0, -0.5, 100.0], np.float32)


def widened(kind):
    """A program that returns its input in float32."""
    x = helper.make_tensor_value_info("x", kind, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    graph = helper.make_graph([node], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    core = openvino.Core()
    return core.compile_model(core.read_model(model.SerializeToString()), "CPU")


print("openvino", openvino.__version__)
seen = {}
for name in ("FLOAT", "FLOAT16", "BFLOAT16"):
    run = widened(getattr(TensorProto, name))
    for kind in (np.float32, np.float16, ml_dtypes.bfloat16):
        try:
            got = np.array(run([VALUES.astype(kind)])[0])
            seen[name, np.dtype(kind).name] = "right" if np.array_equal(got, VALUES) else "wrong"
            print(f"input {name}, array {np.dtype(kind).name}: {got}")
        except ValueError as error:
            seen[name, np.dtype(kind).name] = "refused"
            print(f"input {name}, array {np.dtype(kind).name}: {type(error).__name__}: {error}")
bits = VALUES.astype(np.float16).view(ml_dtypes.bfloat16).astype(np.float32)
assert seen.pop(("BFLOAT16", "float16")) == "wrong"
assert np.array_equal(np.array(widened(TensorProto.BFLOAT16)([VALUES.astype(np.float16)])[0]), bits)
assert seen.pop(("BFLOAT16", "float32")) == "refused"
assert set(seen.values()) == {"right"}, seen
print("holds: float16 arrays are read as bfloat16, bit for bit")
PY
