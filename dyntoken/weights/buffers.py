"""What an official state dict holds besides parameters and statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def with_buffers(model: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Exported weights, completed for torch's strict loading.

    Added are BatchNorm's counters (0) and, for PS-ViT, its starting points and
    the position layer that each of its iterations lists once more. Not added are
    Swin's index tables, which its class makes itself: load those with strict=False.

    Args:
      model: from `create_model`.
      tensors: in the official keys and layouts.
    """
    found = dict(tensors)
    for key in tensors:
        if key.endswith(".running_mean"):
            found[key.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    body = model.plain()
    if type(body).__name__ == "PSViT":
        for step in range(body.iterations):
            for leaf in ("weight", "bias"):
                found[f"ps_layers.{step}.position_layer.{leaf}"] = tensors[f"pos_layer.{leaf}"]
        found["point_coord"] = body.official_points()
    return found
