"""A cascade that starts from a dense model: every exit takes the dense weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dyntoken.cascade import Cascade
from dyntoken.models import Model
from dyntoken.weights import keys

Sort = Callable[[Model], tuple[dict[str, np.ndarray], tuple[str, ...]]]
Shapes = Mapping[str, tuple[int, ...]]
STEMS = ("backbone/patch_embed/", "backbone/tokens_to_token/")
WIDENED = ("/norm2/", "/mlp/fc1/kernel")  # where the context embedding of the exit before comes in


def dense_of(model: Cascade, index: int) -> Model:
    """The dense model with the backbone and the classifier of one exit."""
    return Model(model.arch, model.dense_recipe(index), num_classes=model.num_classes, pool=model.pool)


def spread(model: Cascade, sort: Sort, shapes: Shapes) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The arrays of a dense source for every exit.

    A stem of another patch size starts fresh. The norm and the first layer of
    an MLP that also takes the context embedding get its channels added as if it
    were not there: scale 1, shift 0, weight 0.

    Args:
      model: the cascade.
      sort: a dense model -> the source's arrays by its paths, and the keys left over.
      shapes: of the cascade.

    Returns:
      arrays by the cascade's paths, and the keys that no exit wants.
    """
    result: dict[str, np.ndarray] = {}
    unwanted: list[set[str]] = []
    for index in range(len(model.exits)):
        found, unexpected = sort(dense_of(model, index))
        unwanted.append(set(unexpected))
        wanted = {path: shapes[f"exit_{index}/{path}"] for path in found}
        same_stem = all(
            tuple(found[path].shape) == want for path, want in wanted.items() if path.startswith(STEMS)
        )
        for path, value in found.items():
            if same_stem or not path.startswith(STEMS):
                result[f"exit_{index}/{path}"] = _widened(path, value, wanted[path])
    left = set.intersection(*unwanted)
    return result, tuple(key for key in sorted(left) if not keys.is_buffer(key))


def _widened(path: str, value: np.ndarray, want: tuple[int, ...]) -> np.ndarray:
    more = (
        want[0] - value.shape[0] if value.ndim == len(want) and any(part in path for part in WIDENED) else 0
    )
    if more <= 0 or value.shape[1:] != want[1:]:
        return value
    fill = 1 if path.endswith("/scale") else 0
    return np.concatenate([value, np.full((more, *value.shape[1:]), fill, value.dtype)])
