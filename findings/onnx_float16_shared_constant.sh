#!/bin/sh
# onnxconverter-common's float16 conversion makes an invalid model of a constant that Max (or Min) shares with
# another node, and of nodes without names.
#
# Expected: a valid ONNX file stays valid: names of nodes are optional there, and one constant may have several readers.
# Seen with onnxconverter-common 1.16.0, read by onnxruntime 1.32.0: Max and Min stay in float32, with them the
# constant, and the other reader has float16 and float32 ("bound to different types"); without node names the
# casts around two such nodes are both called "_output_cast_0" ("Duplicate definition"). The copy of the
# same converter in onnxruntime.transformers is right in the first case and in the second.
# Whoever writes each constant of a ViT once (0, 1, 0.5, epsilon) meets this.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps onnxconverter-common==1.16.0
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxconverter_common import float16
from onnxruntime.transformers.float16 import convert_float_to_float16


def made(shared, named):
    """max(max(x, 0), 0) + 0."""
    zeros = ["zero"] * 3 if shared else ["zero", "zero_1", "zero_2"]
    nodes = [
        helper.make_node(kind, [source, zero], [target], name=target if named else "")
        for kind, source, zero, target in zip(("Max", "Max", "Add"), ("x", "a", "b"), zeros, ("a", "b", "y"))
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 3]) for name in "xy")
    constants = [numpy_helper.from_array(np.float32(0), name) for name in dict.fromkeys(zeros)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def tried(convert, model):
    try:
        found = convert(model).SerializeToString()
        session = onnxruntime.InferenceSession(found, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": np.array([[-1, 0, 2]], np.float16)})[0].tolist() == [[0, 0, 2]]
    except Exception as error:
        return str(error)


seen = {}
for shared in (False, True):
    for named in (True, False):
        for name, convert in (
            ("onnxconverter_common", float16.convert_float_to_float16), ("onnxruntime", convert_float_to_float16)
        ):
            seen[name, shared, named] = tried(convert, made(shared, named))
            print(f"{name}, shared constant {shared}, named nodes {named}: {str(seen[name, shared, named])[:150]}")
ours = {case[1:]: found for case, found in seen.items() if case[0] == "onnxconverter_common"}
assert ours[False, True] is True and all(found is True for case, found in seen.items() if case[0] == "onnxruntime")
assert "bound to different types" in ours[True, True] and "Duplicate definition" in ours[False, False]
print("holds: neither a shared constant nor nodes without names")
PY
