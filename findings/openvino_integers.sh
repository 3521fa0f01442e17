#!/usr/bin/env bash
# OpenVINO's CPU plugin: integers are compared as float32, kept as int32 and, of 8 bits, saturated.
#
# Expected: ONNX's types: 2**24 < 2**24 + 1 in int32, 2**40 + 2**40 in int64, 200 + 100 = 44 in uint8, as onnxruntime
# has it; or an error for a type that the plugin does not have.
# Seen with openvino 2026.4.1: Less, Equal and Greater of int32 see only 24 bits, so that two keys that differ
# in the last bits are equal (scores turned into integers and packed with their position, to rank without ties; ids of
# examples; hashes); of int64 only the lower 32 bits count (2**40 is 0); uint8 sums end at 255 and differences at 0.
# No warning. Sums and products of int32 are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/pip" uninstall --quiet --yes openvino-telemetry
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata

import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper

print("openvino", importlib.metadata.version("openvino"), "onnxruntime", onnxruntime.__version__)
core = openvino.Core()
BOOL = TensorProto.BOOL


def both(operator, kind, a, b, result=None):
    """What onnxruntime and OpenVINO make of two vectors, of any length and of a fixed one."""
    answers = []
    for length in ("n", len(a)):
        element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        ends = [helper.make_tensor_value_info(name, element, [length]) for name in "ab"]
        end = helper.make_tensor_value_info("y", result or element, [length])
        graph = helper.make_graph([helper.make_node(operator, ["a", "b"], ["y"])], "g", ends, [end])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
        feed = {"a": np.array(a, kind), "b": np.array(b, kind)}
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        compiled = core.compile_model(core.read_model(model), "CPU")
        answers.append((session.run(None, feed)[0].tolist(), np.array(compiled(feed)[0]).tolist()))
    assert answers[0] == answers[1], answers
    print(f"{operator} of {kind} {a} and {b}: onnxruntime {answers[0][0]}, openvino {answers[0][1]}")
    return answers[0]


large = 2**24
assert both("Less", "int32", [large, 1], [large + 1, 2], BOOL) == ([True, True], [False, True]), "changed"
assert both("Equal", "int32", [large, 1], [large + 1, 1], BOOL) == ([False, True], [True, True]), "changed"
assert both("Greater", "int32", [2**30 + 63], [2**30], BOOL) == ([True], [False]), "changed"
assert both("Add", "int32", [large], [1]) == ([large + 1], [large + 1]), "changed"
assert both("Add", "int64", [2**40, 5], [2**40, 2]) == ([2**41, 7], [0, 7]), "changed"
assert both("Add", "uint8", [200], [100]) == ([44], [255]), "changed"
assert both("Sub", "uint8", [100], [200]) == ([156], [0]), "changed"
print("holds: OpenVINO compares int32 by float32, cuts int64 to 32 bits and saturates uint8")
PY
