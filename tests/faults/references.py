"""What the tests of official constructors share: arithmetic by hand, and arrays in the official layouts."""

from __future__ import annotations

import math

import jax
import numpy as np

from dyntoken import weights
from dyntoken.weights import official

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "nn.ReLU": lambda x: np.maximum(x, 0),
    "nn.SiLU": lambda x: x / (1 + np.exp(-x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "nn.LeakyReLU": lambda x: np.where(x > 0, x, 0.01 * x),
}
SWIN = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 8,
    "depths": (1, 1),
    "num_heads": (1, 2),
    "num_classes": 5,
}


def tensors_of(repository, cls, constructor):
    """A random state dict of an official class."""
    reference = official.build(repository, cls, constructor)
    shapes = weights.shapes_of(reference.model)
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(0, 0.3, shape).astype(np.float32) for path, shape in shapes.items()}
    return weights.reference_keys(reference.model, no_embed_class=bool(reference.grid_only)).export(flat)


def fields_of(repository, cls, **constructor):
    model = official.build(repository, cls, constructor).model
    return {**dict(model.backbone.options), "model": model}


def attention(x, qkv, proj, heads, bias=0.0):
    """Self-attention of `x [n, C]` in numpy; heads as wide as `qkv` says."""
    q, k, v = (x @ qkv[0] + qkv[1]).reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
    a = np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]) + bias)
    y = (a / a.sum(-1, keepdims=True)) @ v
    return y.transpose(1, 0, 2).reshape(len(x), -1) @ proj[0] + proj[1]


def filled(module, *arguments):
    """Random variables of a module."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


def layer(variables, name):
    return (variables["params"][name]["kernel"], variables["params"][name]["bias"])


def convolved(x, weight, bias, stride, padding):
    """A convolution of `x [H, W, Cin]` with a weight `[out, in, k, k]` in numpy."""
    k = weight.shape[-1]
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    rows = range(0, x.shape[0] - k + 1, stride)
    return np.array(
        [[np.einsum("hwc,ochw->o", x[i : i + k, j : j + k], weight) + bias for j in rows] for i in rows]
    )
