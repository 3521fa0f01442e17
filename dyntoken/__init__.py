"""Adaptive-token vision transformers in JAX.

Any reduction method x any backbone, one parameter tree, static shapes. Names
are imported on first use: `import dyntoken` loads neither TensorFlow nor Orbax.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from dyntoken import interrupt

if interrupt.is_program():  # the first of our code that runs: seconds of imports are still to come
    interrupt.install()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of C++; what is wrong comes as an exception

__version__ = "0.1.0"

_NAMES = {
    "create_model": "dyntoken.models",
    "list_models": "dyntoken.models",
    "reduced": "dyntoken.models",
    "make_reducer": "dyntoken.reducers",
    "register_scorer": "dyntoken.reducers",
    "register_fuser": "dyntoken.reducers",
    "register_method": "dyntoken.reducers",
    "register_backbone": "dyntoken.backbones",
    "register_loss": "dyntoken.losses",
    "register_data": "dyntoken.data",
    "Reducer": "dyntoken.reducers",
    "Scores": "dyntoken.reducers",
    "Fused": "dyntoken.ops.fuse",
    "load_run": "dyntoken.runs",
    "load_pretrained": "dyntoken.weights",
    "load_weights": "dyntoken.weights",
    "save_weights": "dyntoken.weights",
    "import_reference": "dyntoken.weights",
    "preprocess": "dyntoken.preprocessing",
    "export": "dyntoken.exporting",
    "load_export": "dyntoken.exporting",
    "Predictor": "dyntoken.predictor",
    "predict": "dyntoken.predictor",
    "Features": "dyntoken.features",
    "unreduce": "dyntoken.features",
    "Tokens": "dyntoken.types",
    "Reduction": "dyntoken.types",
    "Output": "dyntoken.types",
}
_MODULES = ("analysis", "config", "data", "eval", "losses", "ops", "reducers", "train", "weights")
__all__ = sorted([*_NAMES, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"dyntoken.{name}")
    raise AttributeError(f"module 'dyntoken' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
