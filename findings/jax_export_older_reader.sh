#!/bin/sh
# jax.export: a file of jax 0.10.2 cannot be read by 0.9.0, of the same calling convention.
#
# Expected: a reader that knows the file's calling_convention_version (10) runs it, or says which jax wrote it.
# Seen (CPU): jax 0.9.0 opens the file of 0.10.2, reports convention 10, and fails in `call` with "Failed to
# deserialize StableHLO", which names no version; the other way round it works. The operation it stops at is top_k (erf
# does it, too), which 0.10.2 writes as a newer `vhlo.composite_v2`. jax promises three weeks forward, no more.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/run.py" <<'PY'
import pathlib
import sys

import jax
import jax.export
import jax.numpy as jnp

mine, other, expected = sys.argv[1:]
(batch,) = jax.export.symbolic_shape("b")


def program(x):
    scores = jax.nn.softmax(x, axis=-1)
    return jnp.take_along_axis(x, jax.lax.top_k(scores, 3)[1], axis=1)


if expected == "write":
    made = jax.export.export(jax.jit(program))(jax.ShapeDtypeStruct((batch, 8), jnp.float32))
    pathlib.Path(mine).write_bytes(made.serialize())
    print("jax", jax.__version__, "writes calling convention", made.calling_convention_version)
else:
    read = jax.export.deserialize(bytearray(pathlib.Path(other).read_bytes()))
    try:
        best = read.call(jnp.arange(16.0).reshape(2, 8))[:, 0].tolist()
        seen = "runs" if best == [7.0, 15.0] else "other numbers"
    except Exception as error:
        assert "Failed to deserialize StableHLO" in str(error), error
        seen = "fails"
    print("jax", jax.__version__, "opens convention", read.calling_convention_version, "of", pathlib.Path(other).name, seen)
    assert seen == expected, seen
PY
for version in 0.9.0 0.10.2; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "jax==$version" "jaxlib==$version" numpy==2.3.5 flatbuffers==25.9.23
done
export JAX_PLATFORMS=cpu
for version in 0.9.0 0.10.2; do "$folder/$version/bin/python" "$folder/run.py" "$folder/of_$version" - write; done
"$folder/0.10.2/bin/python" "$folder/run.py" - "$folder/of_0.9.0" runs
"$folder/0.9.0/bin/python" "$folder/run.py" - "$folder/of_0.10.2" fails
echo "holds: jax 0.9.0 cannot run a file of jax 0.10.2, whose calling convention it knows"
