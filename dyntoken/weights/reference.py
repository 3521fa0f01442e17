"""Official models with their weights, in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dyntoken.models import Model
from dyntoken.weights import files, keys, layouts, official, placing, trees
from dyntoken.weights.errors import WeightsError


def import_reference(
    repository: str, cls: str, constructor: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[Model, dict[str, Any]]:
    """An official model as a model of this library.

    Args:
      repository: e.g. "timm", "raoyongming/DynamicViT",
        "megvii-research/TPS-CVPR2023", "youweiliang/evit",
        "yitu-opensource/T2T-ViT", "blackfeather-wang/Dynamic-Vision-Transformer".
      cls: class name in that repository, e.g. "VisionTransformerDiffPruning".
      constructor: its constructor arguments, see `official`; layers are given as text
        (`norm_layer="LayerNorm(eps=1e-6)"`).
      tensors: its state dict as numpy arrays, own key names and layouts; or a
        whole checkpoint that wraps one (`model_state_dict` and the like).

    Returns:
      `(model, variables)`.

    Raises:
      WeightsError: unknown class or argument, or tensors that are missing, left
        over or of another shape.
    """
    reference = official.build(repository, cls, constructor)
    model, shapes = reference.model, trees.shapes_of(reference.model)
    if files.is_wrapped(tensors):
        tensors = files.read(tensors, "params").tensors
    key_map = trees.reference_keys(model, no_embed_class=bool(reference.grid_only))
    origin = f"{repository} {cls}"
    arrays = {key: np.asarray(value) for key, value in tensors.items() if not keys.is_buffer(key)}
    bundle = layouts.fused(files.Bundle(arrays, {}, origin, own=False))
    bundle = layouts.without_prefix(bundle, [key_map], "params")
    found, unexpected = trees.sort(bundle.tensors, key_map)
    missing = [key_map.by_path[path].key for path in shapes if path not in found]
    if missing or unexpected:
        raise WeightsError(
            f"{origin}: the state dict does not fit the constructor arguments; "
            f"missing: {_listed(missing)}; left over: {_listed(unexpected)}"
        )
    placing.check_shapes(found, shapes, origin, model.input_shape[2])
    return model, trees.nested_variables(found)


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - 6} more" if len(names) > 6 else ""
    return f"{', '.join(names[:6]) or 'none'}{more}"


def export_reference(
    model: Model, variables: Mapping[str, Any], *, no_embed_class: bool = False
) -> dict[str, np.ndarray]:
    """Variables, or their gradients, under the reference's own keys and layouts."""
    return trees.reference_keys(model, no_embed_class=no_embed_class).export(trees.flat_variables(variables))


def with_buffers(model: Model, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Exported weights, completed for torch's strict loading.

    Added are BatchNorm's counters (0) and what else the official class registers, see `keys.Naming.buffers`.

    Args:
      model: from `create_model`.
      tensors: in the official keys and layouts.
    """
    statistics = [key for key in tensors if key.endswith(".running_mean")]
    counters = {
        key.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64) for key in statistics
    }
    return {**tensors, **counters, **trees.naming_of(model).buffers(model.plain(), tensors)}
