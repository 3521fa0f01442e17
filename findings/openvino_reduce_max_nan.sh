#!/bin/sh
# OpenVINO's ReduceMax and ReduceMin forget what stood before a NaN; onnxruntime's skip the NaN.
#
# Expected: NaN, as numpy and jax have it, or the largest of the other numbers; at any place the same.
# Seen with openvino 2026.4.1 (CPU): of [9, NaN, 1] the maximum is 1, of [1, NaN, 9] it is 9; onnxruntime 1.32.0
# gives 9 for both.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1
"$folder/venv/bin/pip" uninstall --quiet --yes openvino-telemetry
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper

values = np.array([[9, np.nan, 1], [1, np.nan, 9]], np.float32)
for kind, want in (("ReduceMax", [9, 9]), ("ReduceMin", [1, 1])):
    node = helper.make_node(kind, ["x", "axes"], ["y"], keepdims=0)
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b"])
    graph = helper.make_graph([node], "g", [x], [y], [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    other = session.run(None, {"x": values})[0].tolist()
    core = openvino.Core()
    ours = np.array(core.compile_model(core.read_model(model), "CPU")({"x": values})[0]).tolist()
    print(kind, values.tolist(), "onnxruntime", other, "openvino", ours)
    assert other == want and ours == [1, 9], (other, ours)
print("holds: openvino's ReduceMax and ReduceMin give the number behind the NaN")
PY
