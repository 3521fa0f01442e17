#!/bin/sh
# OpenVINO's CPU plugin: arithmetic after a ReduceSum of int32 is wrong for a symbolic batch above 1.
#
# Expected: sums of integers, minus one, for any batch.
# Seen with openvino 2026.4.1: right for a batch of 1, wrong from 2 on; the sum by itself is right, and so
# is all of it in float32. onnxruntime 1.32.0 is right. An index computed so reads other rows, silently.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 openvino==2026.4.1
"$folder/venv/bin/pip" uninstall --quiet --yes openvino-telemetry
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import openvino
from onnx import TensorProto, helper, numpy_helper


def compiled(element, minus):
    cast = helper.make_node("Cast", ["hit"], ["number"], to=element)
    nodes = [
        helper.make_node("Unsqueeze", ["x", "last"], ["column"]),
        helper.make_node("Equal", ["column", "cells"], ["hit"]),
        cast,
        helper.make_node("ReduceSum", ["number", "first"], ["sum"], keepdims=0),
    ]
    nodes += [helper.make_node("Sub", ["sum", "one"], ["y"])] if minus else [helper.make_node("Identity", ["sum"], ["y"])]
    kind = np.int32 if element == TensorProto.INT32 else np.float32
    constants = {
        "last": np.array([2]), "first": np.array([1]), "one": np.ones(1, kind), "cells": np.arange(16, dtype=np.int32)[None, None]
    }
    used = [numpy_helper.from_array(v, k) for k, v in constants.items() if minus or k != "one"]
    x = helper.make_tensor_value_info("x", TensorProto.INT32, ["b", 5])
    y = helper.make_tensor_value_info("y", element, ["b", 16])
    graph = helper.make_graph(nodes, "g", [x], [y], used)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    core = openvino.Core()
    return core.compile_model(core.read_model(model.SerializeToString()), "CPU")


seen = {}
for name, element in (("int32", TensorProto.INT32), ("float32", TensorProto.FLOAT)):
    for minus in (0, 1):
        run = compiled(element, minus)
        for batch in (1, 7):
            x = np.random.default_rng(0).permuted(np.tile(np.arange(16, dtype=np.int32), (batch, 1)), axis=1)[:, :5]
            want = (x[:, :, None] == np.arange(16)).sum(axis=1) - minus
            seen[name, minus, batch] = bool(np.array_equal(np.array(run({"x": x})[0]), want))
for case, right in seen.items():
    print(*case, "right" if right else "WRONG")
assert {case for case, right in seen.items() if not right} == {("int32", 1, 7)}
print("holds: a sum of int32, minus one, is wrong for a symbolic batch above 1")
PY
