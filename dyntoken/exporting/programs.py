"""What is exported of a model: one function, or one per exit, from named arrays to named arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from dyntoken import device_augment
from dyntoken.models import Model
from dyntoken.preprocessing import Preprocess
from dyntoken.types import Output
from dyntoken.weights import trees

Array = jax.Array
Arrays = Mapping[str, Any]
IMAGES, LOGITS, KEEP = "images", "logits", "keep_"
NEXT = "next_"  # begins the name of an output that the next exit takes, under the rest of the name


@dataclasses.dataclass(frozen=True)
class Program:
    """One function of a model, whole or an exit of it.

    Attributes:
      name: "model", or "exit_0", "exit_1", ...
      run: from flat weights and inputs to outputs, all of them dicts of arrays.
      inputs: by name, the batch as the symbol `b`: "images", and for an exit what
        the one before handed on.
      outputs: likewise: "logits", "keep_0" (kept rows of site 0, best first; sites
        are numbered exit after exit), and what is handed on as "next_" and its name.
    """

    name: str
    run: Callable[[Arrays, Arrays], dict[str, Array]]
    inputs: dict[str, jax.ShapeDtypeStruct]
    outputs: dict[str, jax.ShapeDtypeStruct]


def programs(model: Model, weights: Arrays, pixels: Preprocess | None) -> tuple[Program, ...]:
    """The programs of a model in evaluation.

    Args:
      weights: flat, arrays or their shapes.
      pixels: how uint8 images are normalised inside; None takes normalised float32.
    """
    (batch,) = jax.export.symbolic_shape("b")
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in weights.items()}
    images = jax.ShapeDtypeStruct((batch, *model.input_shape), jnp.uint8 if pixels else jnp.float32)
    found: list[Program] = []
    upstream, first = None, 0
    for index in range(max(1, len(model.exits))):
        inputs = {} if index and model.images_once else {IMAGES: images}
        inputs |= _named(upstream)
        step = _step(model, pixels, index, upstream, first)
        result, upstream = jax.eval_shape(step, shapes, inputs)
        name = f"exit_{index}" if model.exits else "model"
        found.append(Program(name, _flat(step), inputs, _with_next(result, upstream)))
        first += sum(key.startswith(KEEP) for key in result)
    return tuple(found)


def _step(
    model: Model, pixels: Preprocess | None, index: int, upstream: Any, first: int
) -> Callable[..., Any]:
    """One program as (its own outputs, what it hands on); its first site has the number `first`."""
    names, structure = tuple(_named(upstream)), jax.tree.structure(upstream)

    def run(weights: Arrays, inputs: Arrays) -> tuple[dict[str, Array], Any]:
        variables = trees.nested_variables(weights)
        if IMAGES not in inputs:  # only their number counts
            images = jnp.zeros((inputs[names[0]].shape[0], 1, 1, 1))
        elif pixels is None:
            images = inputs[IMAGES]
        else:
            images = device_augment.normalize(inputs[IMAGES], pixels.mean, pixels.std)
        if not model.exits:
            return _results(cast(Output, model.apply(variables, images)), first), None
        handed = jax.tree.unflatten(structure, [inputs[name] for name in names]) if names else None
        out, after = model.apply(variables, images, handed, index=index, method="step_output")
        return _results(out, first), after

    return run


def _results(out: Output, first: int) -> dict[str, Array]:
    kept = {f"{KEEP}{first + number}": site.keep for number, site in enumerate(out.reductions)}
    return {LOGITS: out.logits, **{name: rows for name, rows in kept.items() if rows is not None}}


def _flat(step: Callable[..., Any]) -> Callable[..., dict[str, Array]]:
    return lambda weights, inputs: _with_next(*step(weights, inputs))


def _with_next(result: dict[str, Any], upstream: Any) -> dict[str, Any]:
    return {**result, **{NEXT + name: leaf for name, leaf in _named(upstream).items()}}


def _named(upstream: Any) -> dict[str, Any]:
    """The arrays of what an exit hands on, `features_0`, ...; of a single one `rows`."""
    leaves = jax.tree_util.tree_leaves_with_path(upstream)
    return {jax.tree_util.keystr(path, simple=True, separator="_") or "rows": leaf for path, leaf in leaves}
