#!/bin/sh
# Pillow 13 resizes by rows first where the height shrinks more than the width, Pillow 12 by columns first.
#
# Expected: `Image.resize` of the same picture to the same size gives the same pixels in both, and a part of
# the result, asked for by `box`, the pixels that the whole has there. Evaluation pipelines (timm, torchvision,
# transformers' slow processors) resize so, and references are made with any version.
# Seen with Pillow 12.3.0 and 13.0.0: each pass rounds and clips to 8 bits, so the order shows, by several grey
# levels under the bicubic kernel; within 13.0.0 a `box` of a picture can be resized in another order than the whole.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.3.5
for version in 12.3.0 13.0.0; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "pillow==$version"
  "$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import numpy as np
import PIL
from PIL import Image

picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 301, 3)).astype(np.uint8))
kernel = Image.Resampling.BICUBIC
rows_first = picture.resize((301, 281), kernel).resize((380, 281), kernel)
columns_first = picture.resize((380, 400), kernel).resize((380, 281), kernel)
whole = np.asarray(picture.resize((380, 281), kernel), int)
apart = [int(np.abs(np.asarray(one, int) - whole).max()) for one in (rows_first, columns_first)]
print("pillow", PIL.__version__, "wider and lower: from rows first", apart[0], "from columns first", apart[1])
new = PIL.__version__.startswith("13")
assert (apart[0] == 0) == new and (apart[1] == 0) == (not new), apart
whole = np.asarray(picture.resize((256, 340), kernel), int)[58:282, 16:240]
box = 16 * 301 / 256, 58 * 400 / 340, 240 * 301 / 256, 282 * 400 / 340
part = int(np.abs(np.asarray(picture.resize((224, 224), kernel, box), int) - whole).max())
print("pillow", PIL.__version__, "a box against the same part of the whole:", part)
assert (part > 2) == new, part
PY
done
echo "holds: Pillow 13 changes the order of the passes by size, and the pixels with it"
