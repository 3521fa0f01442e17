"""The error of a weight source that cannot be read or does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class WeightsError(ValueError):
    """A weight source that cannot be read or does not fit; one line with the remedy."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class NoWeightsError(WeightsError):
    """There is nothing where a weight source should be; `near` is what lies there under a like name."""

    def __init__(self, name: str, near: str | None, remedy: str):
        hint = f"did you mean {near}?" if near else remedy
        super().__init__(f"{name}: no such weight file or directory: {hint}")
        self.name, self.near = name, near


def printable(text: str) -> str:
    """`text` without terminal escapes and on one line; names out of a file may hold either."""
    return re.sub(r"[^\S ]+|[\x00-\x1f\x7f-\x9f]", " ", ESCAPES.sub("", text))


def check_not_empty(tensors: Mapping[str, np.ndarray], origin: str) -> None:
    """Refuses arrays without a single value, as DeepSpeed's ZeRO-3 writes weights that it did not gather."""
    if empty := [name for name, value in tensors.items() if not value.size]:
        shown = ", ".join(empty[:3]) + (", ..." if empty[3:] else "")
        raise WeightsError(
            f"{origin}: arrays without a value: {shown}. DeepSpeed's ZeRO-3 saves such unless told to gather the "
            "weights (stage3_gather_16bit_weights_on_model_save, or its zero_to_fp32.py afterwards)"
        )


def damaged(path: Any, kind: str, error: Exception | str) -> WeightsError:
    """The error for a file that cannot be read."""
    return WeightsError(
        f"{path}: truncated or damaged {kind} file ({first_line(error)}); copy or download it again"
    )


def first_line(error: Exception | str) -> str:
    """What an error says, at most 160 characters of it."""
    text = printable(str(error).strip().split("\n")[0])
    return text[:160] or type(error).__name__
