"""A model's tree of variables, flat, and its key map."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.models import Model
from dyntoken.weights import files, keys
from dyntoken.weights.errors import WeightsError

Shapes = Mapping[str, tuple[int, ...]]


def naming_of(model: Model) -> keys.Naming:
    """Row of `keys.RULES` for a model's backbone; a subclass has the keys of what it extends."""
    make = model.backbone.make
    if (naming := model.backbone.get("naming", getattr(make, "naming", None))) is None:
        raise WeightsError(f"{model.arch}: no public key names are known for backbone {make.__name__}")
    return keys.RULES[naming]


def reference_keys(model: Model, *, no_embed_class: bool = False) -> keys.KeyMap:
    """The key map between `model` and the public format of its backbone."""
    grid_only = model.plain().positions_of("backbone/pos_embed")[0] if no_embed_class else 0
    return keys.key_map(shapes_of(model), naming_of(model), grid_only=grid_only)


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """Flat tree of `model`, path to shape; nothing is computed."""
    return dict(_shapes(model))


@functools.lru_cache(maxsize=16)
def _shapes(model: Model) -> tuple[tuple[str, tuple[int, ...]], ...]:
    images = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    return tuple((path, tuple(leaf.shape)) for path, leaf in flat_variables(tree).items())


def initialised(model: Model, seed: int, paths: Sequence[str]) -> dict[str, Any]:
    """What `init` gives at some paths; the compiler drops all else, the forward pass included."""

    def init(key: Any) -> dict[str, Any]:
        flat = flat_variables(model.init(key, jnp.zeros((1, *model.input_shape), jnp.float32)))
        return {path: flat[path] for path in paths}

    return jax.jit(init)(jax.random.key(seed))


def flat_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables as a flat dict: parameters by path, statistics under "batch_stats/"."""
    if "params" not in variables:
        variables = {"params": variables}
    return {
        ("" if collection == "params" else f"{collection}/")
        + jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for collection in ("params", "batch_stats")
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables.get(collection, {}))
    }


def nested_variables(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flat_variables`, as JAX arrays."""
    named = {
        path if path.startswith("batch_stats/") else f"params/{path}": value for path, value in flat.items()
    }
    return files.nest({path: jnp.asarray(value) for path, value in named.items()})


def sort(
    tensors: Mapping[str, np.ndarray], key_map: keys.KeyMap
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Arrays by our path, and the source's keys that no parameter wants."""
    found: dict[str, np.ndarray] = {}
    unexpected = []
    for key, value in key_map.spelled(tensors).items():
        entry = key_map.find(key)
        if entry is not None and entry.path not in found:
            found[entry.path] = entry.from_reference(value)
        elif entry is not None and np.array_equal(entry.from_reference(value), found[entry.path]):
            continue  # a shared layer, listed once more
        elif not keys.is_buffer(key):
            unexpected.append(key)
    return found, tuple(unexpected)
