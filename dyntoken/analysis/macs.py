"""Multiply-adds, parameters and tokens of a model, from its shapes alone.

The model is traced in its plain form (evaluation, gathered where the method can be, one
image, the CPU's operators, so that neither one-hot products nor fused kernels hide what
is computed); nothing is allocated or run. Only what the logits need is counted.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from dyntoken.analysis.jaxpr import Operation, operations
from dyntoken.nn.reduction_sites import REDUCER, added
from dyntoken.nn.spec import Spec
from dyntoken.ops import backend

RESIZE = "resize"  # the named scope whose work stands on its own line
BLOCK = re.compile(r"blocks_\d+")
EXIT = re.compile(r"exit_\d+")
STAGE = re.compile(r"stage_\d+")
REUSE = re.compile(r"reuse_\d+")


@dataclasses.dataclass(frozen=True)
class Macs:
    """Multiply-adds by operator class."""

    conv: int = 0
    dot: int = 0

    @property
    def total(self) -> int:
        return self.conv + self.dot

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.conv + other.conv, self.dot + other.dot)


@dataclasses.dataclass(frozen=True)
class Block:
    """One block; its multiply-adds are without the reducer's own.

    Attributes:
      name: module path, e.g. `backbone/trunk/blocks_3`.
      tokens, tokens_out: rows its first and its last layer work on, prefix tokens
        included; the last on fewer where a reducer sits between attention and MLP
        (EViT, eTPS), or where the others take a fast path (Swin).
    """

    name: str
    tokens: int
    tokens_out: int
    macs: Macs
    params: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """The stretch between two reduction sites.

    Attributes:
      tokens: rows of every block in it (prefix tokens included).
      blocks, names: numbers and module paths of its blocks; one that holds a
        reducer inside belongs to two stages, each with its share.
      macs: multiply-adds of those blocks.
      reducer: multiply-adds of the reducer that opens the stage, 0 for none.
      exit: number of the exit of a cascade that it belongs to, else None.
    """

    tokens: int
    blocks: tuple[int, ...]
    macs: int
    reducer: int
    exit: int | None = None
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Count:
    """What a model costs for one image of (height, width, channels).

    Attributes:
      resize: multiply-adds under a named scope "resize" (interpolation), which
        papers leave out; they are in nothing else here.
      by_module, by_params: module path -> what lies directly in it.
      by_block: in order.
      stages: one per reduction site and one before the first.
    """

    image_shape: tuple[int, int, int]
    resize: int
    by_module: Mapping[str, Macs]
    by_block: tuple[Block, ...]
    stages: tuple[Stage, ...]
    by_params: Mapping[str, int]

    conv = property(lambda self: self.under("").conv, doc="Multiply-adds of convolutions.")
    dot = property(lambda self: self.under("").dot, doc="Multiply-adds of matrix products of any kind.")
    total = property(lambda self: self.under("").total, doc="Multiply-adds, `conv + dot`.")
    gmacs = property(lambda self: self.total / 1e9, doc="`total` in units of 1e9.")
    params = property(lambda self: self.params_under(""), doc="Number of parameters.")

    @property
    def tokens(self) -> tuple[int, ...]:
        """Rows each block works on, prefix tokens included."""
        return tuple(block.tokens for block in self.by_block)

    def under(self, module: str) -> Macs:
        """Multiply-adds of a module and everything inside it."""
        return sum((m for path, m in self.by_module.items() if _within(path, module)), Macs())

    def params_under(self, module: str) -> int:
        """Parameters of a module and everything inside it."""
        return sum(n for path, n in self.by_params.items() if _within(path, module))


def count(model: Any, image_shape: Sequence[int] | None = None, *, upto: int | None = None) -> Count:
    """Counts the multiply-adds of one image.

    Args:
      model: a classifier from `create_model`, or any linen module that maps
        images `[B, H, W, C]` to logits or an `Output`.
      image_shape: (height, width, channels); by default the model's own.
      upto: of a model with exits, number of the last one that is run; None runs all.

    Raises:
      ValueError: no `image_shape` for a foreign module, or one of wrong rank.
    """
    shape = getattr(model, "input_shape", None) if image_shape is None else image_shape
    if shape is None:
        raise ValueError(
            f"{type(model).__name__} has no input_shape: give image_shape=(height, width, channels)"
        )
    if len(shape) != 3:
        raise ValueError(f"image_shape must be (height, width, channels), got {shape}")
    shape = tuple(map(int, shape))
    if getattr(model, "form", "auto") != "auto":
        model = model.clone(form="auto")  # rows go where they can
    recipe = getattr(model, "backbone", None)
    if isinstance(recipe, Spec) and recipe.get("scan"):  # whose blocks have no names of their own
        model = model.clone(backbone=recipe.with_(scan=False))
    options = {} if upto is None else {"upto": upto}

    def logits(variables, images):
        out = model.apply(variables, images, **options)
        return getattr(out, "logits", out)

    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    with backend.trace_for("cpu"):
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
        jaxpr = jax.make_jaxpr(logits)(variables, images).jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    root = type(model).__name__
    ops = [
        dataclasses.replace(op, path=tuple(name for name in op.path if name != root))
        for op in operations(live)
    ]
    params: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables.get("params", {})):
        module = "/".join(key.key for key in path[:-1])
        params[module] = params.get(module, 0) + math.prod(leaf.shape)
    modules: dict[str, list[Operation]] = {}
    counted = [op for op in ops if RESIZE not in op.path]
    for op in counted:
        if op.macs:
            modules.setdefault("/".join(op.path), []).append(op)
    return Count(
        image_shape=shape,
        resize=sum(op.macs for op in ops if RESIZE in op.path),
        by_module={path: _sum(own) for path, own in modules.items()},
        by_block=_blocks(counted, params),
        stages=_stages(counted),
        by_params=params,
    )


def gmacs(model: Any, whole: Count | None = None) -> float | list[float]:
    """Multiply-adds (1e9) of one image, of a model with exits a list: up to each exit.

    Args:
      model: a classifier from `create_model`.
      whole: its count, where it is known.
    """
    whole = whole or count(model)
    if not model.exits:
        return whole.gmacs
    early = range(len(model.exits) - 1)
    return [*(count(model, whole.image_shape, upto=index).gmacs for index in early), whole.gmacs]


def unit(path: str) -> str:
    """The row of a summary that a module belongs to: its block, its reducer, or its first two or three names."""
    names = path.split("/")
    for depth, name in enumerate(names):
        if REDUCER.fullmatch(name) or BLOCK.fullmatch(name):
            return "/".join(names[: depth + 1])
    start = 1 if EXIT.fullmatch(names[0]) else 0
    whole = names[start : start + 1] == ["head"] or REUSE.fullmatch(names[0])
    staged = STAGE.fullmatch((names[start + 1 : start + 2] or [""])[0])
    return "/".join(names[: start + (1 if whole else 3 if staged else 2)])


def _sum(ops: Iterable[Operation]) -> Macs:
    """Multiply-adds of some operations."""
    found = {"conv": 0, "dot": 0, "": 0}
    for op in ops:
        found[op.kind] += op.macs
    return Macs(found["conv"], found["dot"])


def _part(op: Operation, pattern: re.Pattern[str]) -> str:
    """The path up to the component that matches, "" if none does."""
    for depth, name in enumerate(op.path):
        if pattern.fullmatch(name):
            return "/".join(op.path[: depth + 1])
    return ""


def _within(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(f"{module}/")


def _blocks(ops: Sequence[Operation], params: Mapping[str, int]) -> tuple[Block, ...]:
    held: dict[str, list[Operation]] = {}
    for op in ops:
        block = _part(op, BLOCK)
        if block and not _part(op, REDUCER):
            held.setdefault(block, []).append(op)
    blocks = []
    for name, own in held.items():
        rows = [op.rows for op in own if op.rows and not added("/".join(op.path))] or [0]
        size = sum(n for path, n in params.items() if _within(path, name))
        blocks.append(Block(name, rows[0], rows[-1], _sum(own), size))
    return tuple(blocks)


def _stages(ops: Sequence[Operation]) -> tuple[Stage, ...]:
    """Cuts the program where a reducer first appears and, in a model that reduces, between its exits."""
    reduces = any(_part(op, REDUCER) for op in ops)
    spans: dict[tuple[str, str], list[Operation]] = {}
    costs: dict[tuple[str, str], int] = {}
    here = ("", "")
    for op in ops:
        exit_, reducer = (reduces and _part(op, EXIT)) or here[0], _part(op, REDUCER)
        if exit_ != here[0] or (reducer and (exit_, reducer) not in spans):
            here = (exit_, reducer)
        own = spans.setdefault(here, [])
        if reducer:
            costs[exit_, reducer] = costs.get((exit_, reducer), 0) + op.macs
        elif op.macs and _part(op, BLOCK):
            own.append(op)
    return tuple(_stage(own, costs.get(key, 0), key[0]) for key, own in spans.items())


def _stage(ops: Sequence[Operation], reducer: int, exit_: str) -> Stage:
    names = tuple(dict.fromkeys(_part(op, BLOCK) for op in ops))
    return Stage(
        tokens=next((op.rows for op in ops if op.rows), 0),
        blocks=tuple(int(name.rpartition("_")[2]) for name in names),
        macs=sum(op.macs for op in ops),
        reducer=reducer,
        exit=int(exit_.rpartition("_")[2]) if exit_ else None,
        names=names,
    )
