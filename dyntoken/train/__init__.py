"""Training: a pure per-device step and the loop, checkpoints and reports around it."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "run": "loop",
    "evaluate": "evaluation",
    "dry_run": "compiled",
    "Result": "loop",
    "measure": "evaluation",
    "build": "plan",
    "TrainError": "state",
    "TrainState": "state",
    "make_train_step": "step",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
