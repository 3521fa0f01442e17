#!/usr/bin/env bash
# OpenVINO's CPU plugin reads ONNX's Resize with antialias=1 and resizes without antialias.
#
# Expected: the antialiased result, as onnxruntime gives it, or an error: the attribute is in the standard since opset 18.
# Seen with openvino 2026.4.1: the very result of antialias=0, for linear and cubic, no warning. It is what exporters
# write for torch's interpolate(antialias=True): an input that a graph shrinks itself, or timm's positions on a
# smaller grid, are then others. (onnxruntime equals Pillow and torch only with exclude_outside=1 and, for cubic,
# cubic_coeff_a=-0.5; the standard's own defaults differ from both at the rim.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 pillow==12.0.0 numpy==2.4.6
"$folder/venv/bin/pip" uninstall --quiet --yes openvino-telemetry
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata

import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper
from PIL import Image

print("openvino", importlib.metadata.version("openvino"), "onnxruntime", onnxruntime.__version__)
core = openvino.Core()


def resized(x, side, mode, antialias, **options):
    """By onnxruntime and by OpenVINO."""
    where = {"coordinate_transformation_mode": "half_pixel", "antialias": antialias}
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode=mode, **where, **options)
    sizes = helper.make_tensor("sizes", TensorProto.INT64, [4], [1, 1, side, side])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, s, s]) for n, s in (("x", len(x)), ("y", side))]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [sizes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()
    feed = {"x": x[None, None]}
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0][0, 0], np.array(core.compile_model(core.read_model(model), "CPU")(feed)[0])[0, 0]


for mode, kernel, options in (("linear", Image.BILINEAR, {}), ("cubic", Image.BICUBIC, {"cubic_coeff_a": -0.5})):
    for old, new in ((8, 4), (16, 14), (14, 7)):
        x = np.random.default_rng(0).normal(size=(old, old)).astype(np.float32)
        pillow = np.asarray(Image.fromarray(x).resize((new, new), kernel))
        ort, ov = resized(x, new, mode, 1, exclude_outside=1, **options)
        _, without = resized(x, new, mode, 0, **options)
        away = [float(np.abs(one - pillow).max()) for one in (ort, ov)]
        same = bool(np.array_equal(ov, without))
        print(f"{mode} {old} -> {new}: from Pillow: onnxruntime {away[0]:.1e}, openvino {away[1]:.2f}; as antialias=0: {same}")
        assert away[0] < 1e-5 and away[1] > 0.2 and same, "OpenVINO heeds antialias now"
print("holds: OpenVINO ignores antialias=1 of Resize, onnxruntime does not")
PY
