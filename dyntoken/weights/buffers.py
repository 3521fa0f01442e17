"""What an official state dict holds besides parameters and statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dyntoken.ops import windows


def with_buffers(model: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Exported weights, completed for torch's strict loading.

    Added are BatchNorm's counters (0), for PS-ViT its starting points and the
    position layer that each of its iterations lists once more, and for Swin the
    index table of every block and the mask of those whose windows move.

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
    if type(body).__name__ == "Swin":
        found |= _of_windows(body)
    return found


def _of_windows(body: Any) -> dict[str, np.ndarray]:
    """Swin's tables, as microsoft/Swin-Transformer registers them."""
    found = {}
    for stage, depth in enumerate(body.depths):
        side = body.window_of(stage)
        for index in range(depth):
            block, shift = f"layers.{stage}.blocks.{index}", body.shift_of(stage, index)
            table = windows.relative_position_index(side).reshape(side**2, side**2)
            found[f"{block}.attn.relative_position_index"] = table.astype(np.int64)
            if shift:
                found[f"{block}.attn_mask"] = windows.shift_mask(body.grid_of(stage), side, shift)
    return found
