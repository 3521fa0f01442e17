#!/bin/sh
# Which library XLA's CPU compiler gives matrix products to, and what its flags do to that.
#
# Expected: the text of --xla_cpu_experimental_ynn_fusion_type in jaxlib says "The default list is
# currently empty", so products stay `dot` (Eigen) until a flag asks for another library, and
# --xla_cpu_use_onednn or --xla_cpu_use_xnnpack ask for theirs.
# Seen with jax 0.10.2 on x86-64 with AVX2 or AVX-512: products of every shape of a transformer are YNNPACK
# fusions by default; only an empty list brings `dot` back; the flags of oneDNN and XNNPACK are taken and
# change nothing. Who compares libraries by these flags compares YNNPACK with itself.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/kinds.py" <<'PY'
import re

import jax
import jax.numpy as jnp


def kind(fn, *shapes):
    text = jax.jit(fn).lower(*(jnp.zeros(shape) for shape in shapes)).compile().as_text()
    entry = text[text.index("ENTRY") :]
    return "ynn" if "__ynn_fusion" in entry else "dot" if re.search(r" dot\(", entry) else "other"


layer = kind(lambda x, w: x @ w, (3152, 384), (384, 1536))
attention = kind(lambda q, k: jnp.einsum("bhqd,bhkd->bhqk", q, k), (16, 6, 197, 64), (16, 6, 197, 64))
print(layer, attention)
PY
expect() { # WANTED FLAG
  seen=$(JAX_PLATFORMS=cpu XLA_FLAGS="$2" "$folder/venv/bin/python" "$folder/kinds.py")
  echo "XLA_FLAGS='$2': $seen"
  [ "$seen" = "$1" ]
}
expect "ynn ynn" ""
expect "dot dot" "--xla_cpu_experimental_ynn_fusion_type="
expect "ynn ynn" "--xla_cpu_use_onednn=true"
expect "ynn ynn" "--xla_cpu_experimental_onednn_fusion_type=LIBRARY_FUSION_TYPE_DOT"
expect "ynn ynn" "--xla_cpu_use_xnnpack=true"
expect "ynn ynn" "--xla_cpu_experimental_xnn_fusion_type=LIBRARY_FUSION_TYPE_DOT"
echo "holds: products go to YNNPACK unless its list is emptied; the flags of oneDNN and XNNPACK do nothing"
