#!/usr/bin/env bash
# tensorflow-cpu 2.21.0: tf.image.decode_and_crop_jpeg is not decode_jpeg and a crop.
#
# Expected: the same pixels; its documentation calls it equivalent to the two together.
# Seen: of a JPEG with subsampled colours (4:2:0 and 4:2:2, nearly all photographs; ImageNet is such) the outermost
# columns of the crop differ, by some 20 grey levels: colours there are interpolated without their neighbour
# outside. Without subsampling (4:4:4) it is the same. A pipeline that crops while decoding is so never bit-equal to one
# that crops afterwards, or to Pillow. Remedy: ask for one column more on either side and cut it off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tensorflow-cpu==2.21.0 pillow==12.0.0
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { tail -20 "$folder/log"; exit 1; }
import io

import numpy as np
import tensorflow as tf
from PIL import Image

print("tensorflow", tf.__version__)
rng = np.random.default_rng(0)
height, width = 240, 320
photo = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((width, height), Image.BICUBIC)
found = {}
for subsampling, name in enumerate(("4:4:4", "4:2:2", "4:2:0")):
    stream = io.BytesIO()
    photo.save(stream, "JPEG", quality=90, subsampling=subsampling)
    data = stream.getvalue()
    whole = tf.io.decode_jpeg(data, channels=3).numpy().astype(int)
    worst, columns, margin = 0, set(), 0
    for _ in range(60):
        h, w = (int(rng.integers(16, side)) for side in (height, width))
        y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        crop = tf.image.decode_and_crop_jpeg(data, (y, x, h, w), channels=3).numpy()
        away = np.abs(crop - whole[y : y + h, x : x + w])
        worst = max(worst, int(away.max()))
        columns |= {int(min(c, w - 1 - c)) for c in np.flatnonzero(away.max(axis=(0, 2)))}
        left, right = max(x - 1, 0), min(x + w + 1, width)
        wider = tf.image.decode_and_crop_jpeg(data, (y, left, h, right - left), channels=3).numpy()
        margin = max(margin, int(np.abs(wider[:, x - left : x - left + w] - whole[y : y + h, x : x + w]).max()))
    found[name] = worst > 0, margin
    print(f"{name}: differs by up to {worst} grey levels, in columns {sorted(columns)} from the rim; one column wider: {margin}")
assert found == {"4:4:4": (False, 0), "4:2:2": (True, 0), "4:2:0": (True, 0)}, "the behaviour changed"
print("holds: decode_and_crop_jpeg of subsampled colours differs from decoding and cropping at the rim")
PY
