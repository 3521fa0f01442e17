#!/bin/sh
# transformers' DINOv3 in bfloat16: the rotary angles depend on how the model was brought there.
#
# Expected: the same angles from `from_pretrained(dtype=torch.bfloat16)` and from `model.to(torch.bfloat16)`.
# Seen with transformers 4.57.6: the first keeps the frequencies (`inv_freq`, no part of the file) in float32, the second
# rounds them, and at 1024 pixels its cosines are off by half as much again as by rounding them alone.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==4.57.6 torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" - "$folder/model" <<'PY'
import sys

import torch
import transformers

torch.manual_seed(0)
config = transformers.DINOv3ViTConfig(
    hidden_size=384, num_attention_heads=6, num_hidden_layers=1, intermediate_size=384, num_register_tokens=4
)
whole = transformers.DINOv3ViTModel(config).eval()
whole.save_pretrained(sys.argv[1])
images = torch.randn(1, 3, 1024, 1024)
loaded = transformers.DINOv3ViTModel.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
want = whole.rope_embeddings(images)[0]
cast = whole.to(torch.bfloat16)
kinds = [model.rope_embeddings.inv_freq.dtype for model in (loaded, cast)]
off = [(m.rope_embeddings(images.bfloat16())[0].float() - want).abs().max().item() for m in (loaded, cast)]
print("transformers", transformers.__version__, "frequencies", kinds, "cosines off by", off)
assert kinds == [torch.float32, torch.bfloat16], kinds
assert off[0] < 0.00196 < 0.003 < off[1], off
print("holds: model.to(bfloat16) rounds DINOv3's rotary frequencies, from_pretrained(dtype=bfloat16) does not")
PY
