"""Walks a jaxpr and names every matrix product and convolution in it.

One multiply-add counts 1, biases, norms, activations, softmax and data movement
count 0: the convention of DeiT, DynamicViT and EViT ("FLOPs" in their tables).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from dyntoken.ops.depthwise import SHIFTED

CONTAINERS = "jaxpr", "call_jaxpr", "body_jaxpr", "cond_jaxpr", "fun_jaxpr"
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One equation of interest, in program order.

    Attributes:
      path: names of the modules and named scopes around it, outermost first.
      kind: "conv", "dot", or "" for anything else (0 multiply-adds).
      macs: multiply-adds, loops multiplied out.
      rows: for a product with a weight matrix, the number of rows it is applied
        to (batch times tokens), else 0.
    """

    path: Path
    kind: str = ""
    macs: int = 0
    rows: int = 0


def operations(jaxpr: Any, path: Path = (), times: int = 1) -> Iterator[Operation]:
    """Yields an `Operation` for every equation, entering calls and loops.

    Of a `cond` the dearest branch counts; a `scan` body counts once per step.

    Args:
      jaxpr: a `Jaxpr` or `ClosedJaxpr`.

    Raises:
      ValueError: a product inside a `while` loop, whose trip count no shape tells.
    """
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        scopes = _scopes(path, str(equation.source_info.name_stack))
        here = tuple(scope for scope in scopes if scope != SHIFTED)
        if name == "dot_general":
            yield _dot(equation, here, times)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            _, *inputs = params["dimension_numbers"].rhs_spec  # (output feature, input feature, *space)
            yield Operation(here, "conv", times * _results(equation) * math.prod(kernel[d] for d in inputs))
        elif name == "mul" and SHIFTED in scopes:
            yield Operation(here, "conv", times * _results(equation))
        elif name == "cond":
            branches = ([*operations(branch, scopes, times)] for branch in params["branches"])
            yield from max(branches, key=lambda ops: sum(op.macs for op in ops))
        else:
            rounds = times * (params["length"] if name == "scan" else 1)
            bodies = [params[key] for key in CONTAINERS if key in params]
            inner = [
                op
                for body in bodies
                if hasattr(getattr(body, "jaxpr", body), "eqns")
                for op in operations(body, scopes, rounds)
            ]
            if name == "while" and any(op.macs for op in inner):
                raise ValueError(
                    f"a while loop at {'/'.join(here) or 'the top'} multiplies matrices: cannot count"
                )
            yield from inner or [Operation(here)]


def _results(equation: Any) -> int:
    return math.prod(equation.outvars[0].aval.shape)


def _dot(equation: Any, path: Path, times: int) -> Operation:
    left, right = (v.aval.shape for v in equation.invars)
    (contracted, _), (_, right_batched) = equation.params["dimension_numbers"]
    inner = math.prod(left[d] for d in contracted)
    if not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact):
        return Operation(path)  # integer products are book-keeping of row numbers
    is_layer = len(right) == 2 and not right_batched
    return Operation(
        path, "dot", times * _results(equation) * inner, math.prod(left) // inner if is_layer else 0
    )


def _scopes(path: Path, stack: str) -> Path:
    """Appends a name stack such as `Model/backbone.embed/vmap(proj)`, less what `einsum` adds to it."""
    for name in re.sub(r"\w+\(|\)", "", stack).split("/"):
        name = name.split(".")[0]  # `module.method`
        if name and "->" not in name and (not path or path[-1] != name):
            path = (*path, name)
    return path
