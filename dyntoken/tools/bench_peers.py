"""What bench times beside jax: the dense architecture in PyTorch, and exported models in other runtimes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import tempfile
from collections.abc import Callable
from typing import Any

from etils import epath

PEERS = {
    "vs_torch": "torch",
    "vs_torch_compile": "torch",
    "vs_onnx": "onnxruntime",
    "vs_openvino": "openvino",
}
INSTALL = {
    "torch": "pip install torch",
    "onnxruntime": "pip install onnx onnxruntime",
    "openvino": "pip install onnx openvino",
}
# Fields of a ViT that say how large it is, or nothing of what it computes.
SIZES = {"img_size", "in_chans", "patch_size", "width", "depth", "heads", "mlp_ratio", "norm_eps", "dtype"}
SIZES |= {
    "sites",
    "context",
    "parent",
    "name",
    "resize",
    "naming",
    "scan",
    "remat",
    "drop_path",
    "drop_path_rule",
}


def check_all(args: argparse.Namespace) -> list[str]:
    """The options of `PEERS` that were given.

    Raises:
      ImportError: a peer is missing; with what to install.
    """
    given = [option for option in PEERS if getattr(args, option)]
    for option in given:
        name = PEERS[option]
        for module in (name,) if name == "torch" else ("onnx", name):
            try:
                importlib.import_module(module)
            except ImportError as error:
                flag = f"--{option.replace('_', '-')}"
                raise ImportError(f"{flag} needs {module}: {INSTALL[name]}") from error
    return given


def version(name: str) -> str:
    """Of a peer."""
    return str(importlib.import_module(name).__version__).split("-")[0]


def exported(model: Any, variables: Any, images: Any, runtime: str) -> Callable[[], Any]:
    """The model as ONNX in onnxruntime or openvino (float32 there), called with `images [B, H, W, C]`."""
    import numpy as np

    from dyntoken.exporting import checking, export
    from dyntoken.exporting import folder as folders

    with tempfile.TemporaryDirectory(prefix="dyntoken-bench-") as path:
        export(model, variables, path, formats=("onnx",))
        part, *others = folders.read_about(epath.Path(path))["programs"]
        if others:
            raise ValueError("--vs-onnx and --vs-openvino have models of one exit alone")
        content = (epath.Path(path) / part["onnx"]).read_bytes()
    run = checking.opened(content, part["outputs"], runtime)
    inputs = {"images": np.asarray(images)}
    return lambda: run(inputs)


def torch_vit(model: Any, batch: int, *, train: bool, dtype: str, compile: bool = False) -> Callable[[], Any]:
    """The dense architecture of a plain ViT model in PyTorch, as timm builds it, random weights.

    Pre-norm blocks of torch.nn layers with one qkv product and
    `scaled_dot_product_attention`; on a CUDA device where there is one. `train` adds
    cross-entropy and the gradient, `compile` goes through `torch.compile`.

    Raises:
      ValueError: a backbone that is no plain ViT.
    """
    import torch

    from dyntoken.backbones.vit import ViT

    body = model.plain()
    fields = dataclasses.fields(body) if isinstance(body, ViT) else ()
    odd = [f.name for f in fields if f.name not in SIZES and getattr(body, f.name) != f.default]
    if not fields or odd or body.prefix != 1:
        why = f" ({odd[0]}={getattr(body, odd[0])!r})" if odd else ""
        raise ValueError(
            f"--vs-torch has plain ViTs such as deit_small_patch16_224 alone; {model.arch} is none{why}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    height, width, channels = model.input_shape
    net = _module(body, channels, model.num_classes).to(device, getattr(torch, dtype)).train(train)
    if compile:
        net = torch.compile(net)
    images = torch.randn(batch, channels, height, width, device=device, dtype=getattr(torch, dtype))

    def evaluate() -> Any:
        with torch.inference_mode():
            return _waited(net(images), device)

    def step() -> Any:
        net.zero_grad(set_to_none=True)
        target = torch.zeros(batch, dtype=torch.long, device=device)
        torch.nn.functional.cross_entropy(net(images).float(), target).backward()
        return _waited(None, device)

    return step if train else evaluate


def _waited(result: Any, device: str) -> Any:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return result


def _module(body: Any, channels: int, classes: int) -> Any:
    """A `torch.nn.Module` of the body's sizes."""
    import torch
    from torch import nn

    norm = functools.partial(nn.LayerNorm, body.width, body.norm_eps)
    hidden, each = int(body.width * body.mlp_ratio), body.width // body.heads

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = norm(), norm()
            self.qkv, self.proj = nn.Linear(body.width, 3 * body.width), nn.Linear(body.width, body.width)
            self.mlp = nn.Sequential(nn.Linear(body.width, hidden), nn.GELU(), nn.Linear(hidden, body.width))

        def forward(self, x: Any) -> Any:
            qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, body.heads, each))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.proj(y.transpose(1, 2).flatten(2))
            return x + self.mlp(self.norm2(x))

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            patch, rows = body.patch_size, body.grid[0] * body.grid[1]
            self.embed = nn.Conv2d(channels, body.width, patch, patch)
            self.first = nn.Parameter(torch.zeros(1, body.prefix, body.width))
            self.positions = nn.Parameter(0.02 * torch.randn(1, body.prefix + rows, body.width))
            self.blocks = nn.Sequential(*(Block() for _ in range(body.depth)))
            self.norm, self.head = norm(), nn.Linear(body.width, classes)

        def forward(self, images: Any) -> Any:
            x = self.embed(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.positions
            return self.head(self.norm(self.blocks(x))[:, 0])

    return Vit()
