#!/usr/bin/env bash
# Ray Data 2.60.0: the shape of a greyscale image depends on which images share its block.
#
# Expected: read_images gives [H, W] (or [H, W, 1]) for a greyscale file, wherever it lies; mode= is left out where
# files are to stay as they are.
# Seen: [6, 8] in a block of its own or among its like, [1, 6, 8] beside a colour image: arrays of one block are brought
# to one rank by leading axes. So the same file has other shapes with another override_num_blocks, and in iter_batches
# than in take_all. Code that tells grey from colour by ndim, or takes the last axis for channels, sees one row of
# pixels with 8 channels. ImageNet holds greyscale JPEGs. Remedy: read_images(..., mode="RGB").
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'ray[data]==2.60.0' pandas==3.0.3 pyarrow==26.0.1 numpy==2.4.6 pillow==12.0.0
RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" - "$folder" 2>"$folder/log" <<'PY' || { tail -20 "$folder/log"; exit 1; }
import os
import sys

import ray
from PIL import Image

print("ray", ray.__version__)
ray.init(num_cpus=1, logging_level="ERROR", log_to_driver=False, include_dashboard=False)
ray.data.DataContext.get_current().enable_progress_bars = False
images = os.path.join(sys.argv[1], "images")
os.mkdir(images)
for name, mode, size in (("a", "RGB", (8, 6)), ("b", "L", (8, 6)), ("c", "RGB", (4, 3))):
    Image.new(mode, size, 7).save(f"{images}/{name}.png")


def rows(**options):
    return [row["image"].shape for row in ray.data.read_images(images, **options).take_all()]


batches = ray.data.read_images(images, override_num_blocks=3).iter_batches(batch_format="numpy")
seen = {
    "one block": rows(override_num_blocks=1),
    "a block each": rows(override_num_blocks=3),
    "a block each, iter_batches": [image.shape for batch in batches for image in batch["image"]],
    "mode='RGB'": rows(override_num_blocks=1, mode="RGB"),
}
ray.shutdown()
for name, shapes in seen.items():
    print(f"{name}: {shapes}")
assert [shapes[1] for shapes in seen.values()] == [(1, 6, 8), (6, 8), (1, 6, 8), (6, 8, 3)], "shapes are others now"
print("holds: a greyscale image gains a leading axis where it shares a block with colour images")
PY
