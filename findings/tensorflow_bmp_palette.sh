#!/usr/bin/env bash
# tf.io.decode_image of a BMP with a palette.
#
# tensorflow-cpu 2.21.0, pillow 12.0.0, Python 3.11 or 3.12, Linux x86-64.
# Expected: the colours that the palette states (as of a palette PNG or GIF), or an error.
# Seen: no error; the palette's *indices* come back as grey levels, so a red picture is black. A PNG with
# the same palette is right. Whoever trains on a folder of 8-bit BMPs (Windows, microscopes, scanners) through
# tf.data learns from noise.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check tensorflow-cpu==2.21.0 pillow==12.0.0
TF_CPP_MIN_LOG_LEVEL=3 "$place/venv/bin/python" - 2>"$place/log" <<'PYTHON' || { cat "$place/log"; exit 1; }
import io

import numpy as np
import tensorflow as tf
from PIL import Image

picture = Image.new("P", (4, 4), 0)
picture.putpalette([255, 0, 0, 0, 255, 0])  # index 0 is red, index 1 green
picture.paste(1, (2, 0, 4, 4))
seen = {}
for kind in ("PNG", "BMP"):
    stream = io.BytesIO()
    picture.save(stream, kind)
    assert np.asarray(Image.open(io.BytesIO(stream.getvalue())).convert("RGB"))[0, 0].tolist() == [255, 0, 0]
    pixels = tf.io.decode_image(stream.getvalue(), channels=3).numpy()
    seen[kind] = pixels[0, 0].tolist(), pixels[0, 3].tolist()
    print(f"{kind}: left {seen[kind][0]}, right {seen[kind][1]}; stored: left [255, 0, 0], right [0, 255, 0]")
assert seen["PNG"] == ([255, 0, 0], [0, 255, 0])
assert seen["BMP"] == ([0, 0, 0], [1, 1, 1]), "the behaviour changed"
PYTHON
echo "holds: TensorFlow gives a palette BMP's indices as grey levels, without an error"
