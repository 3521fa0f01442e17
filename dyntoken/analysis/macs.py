"""Multiply-adds, parameters and tokens of a model, from its shapes alone.

The model is traced in its plain form (evaluation, `form="gather"`, one image, the
CPU's operators, so that neither one-hot products nor fused kernels hide what is
computed); nothing is allocated or run. Only what the logits need is counted.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
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
    """One block.

    Attributes:
      name: module path, e.g. `backbone/trunk/blocks_3`.
      tokens: rows its first layer works on (prefix tokens included).
      tokens_out: rows its last layer works on; fewer where the reducer sits
        between attention and MLP (EViT, eTPS), or where the others take a fast
        path (Swin), whose rows do not count here.
      macs: multiply-adds without the reducer's own.
      params: number of parameters.
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
      blocks: numbers of the blocks it touches; one that holds a reducer inside
        belongs to two stages, each with its share. In a hierarchical backbone
        they start again at 0 in each of its own stages.
      names: module paths of those blocks.
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
    """What a model costs for one image.

    Attributes:
      total: multiply-adds, `conv + dot`, without `resize`.
      conv, dot: convolutions; matrix products of any kind.
      resize: multiply-adds under a named scope "resize" (interpolation), which
        papers leave out.
      by_module: module path -> `Macs` of the operations directly in it.
      by_block: one `Block` per block, in order.
      stages: one `Stage` per reduction site and one before the first.
      params: number of parameters.
      by_params: module path -> parameters directly in it.
      image_shape: (height, width, channels) counted for.
    """

    total: int
    conv: int
    dot: int
    resize: int
    by_module: Mapping[str, Macs]
    by_block: tuple[Block, ...]
    stages: tuple[Stage, ...]
    params: int
    by_params: Mapping[str, int]
    image_shape: tuple[int, int, int]

    @property
    def gmacs(self) -> float:
        """`total` in units of 1e9."""
        return self.total / 1e9

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
      upto: of a cascade, number of the last exit that is run; None runs all.

    Raises:
      ValueError: no `image_shape` for a foreign module, or one of wrong rank.
    """
    shape = default_image_shape(model) if image_shape is None else tuple(int(n) for n in image_shape)
    if len(shape) != 3:
        raise ValueError(f"image_shape must be (height, width, channels), got {shape}")
    if getattr(model, "form", "gather") != "gather":
        model = model.clone(form="gather")
    model = _unlooped(model)
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    with backend.trace_for("cpu"):
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
        ops = [*_trace(model, variables, images, upto)]
    return _tally(ops, _params_by_module(variables), shape)


def _unlooped(model: Any) -> Any:
    """The model with every block by its name, where it runs some of them as one loop."""
    recipe = getattr(model, "backbone", None)
    if not isinstance(recipe, Spec) or not recipe.get("scan"):
        return model
    return model.clone(backbone=recipe.with_(scan=False))


def default_image_shape(model: Any) -> tuple[int, int, int]:
    """(height, width, channels) a model was built for.

    Raises:
      ValueError: a foreign module that does not say.
    """
    shape = getattr(model, "input_shape", None)
    if shape is None:
        raise ValueError(
            f"{type(model).__name__} has no input_shape: give image_shape=(height, width, channels)"
        )
    return tuple(shape)


def unit(path: str) -> str:
    """The row of a summary that a module belongs to: its block, its reducer, or its first names.

    Those are two, or three where the second is a stage of a hierarchical backbone.
    """
    names = path.split("/")
    for depth, name in enumerate(names):
        if REDUCER.fullmatch(name) or BLOCK.fullmatch(name):
            return "/".join(names[: depth + 1])
    start = 1 if EXIT.fullmatch(names[0]) else 0
    whole = names[start : start + 1] == ["head"] or REUSE.fullmatch(names[0])
    staged = STAGE.fullmatch((names[start + 1 : start + 2] or [""])[0])
    return "/".join(names[: start + (1 if whole else 3 if staged else 2)])


def exits(model: Any) -> int:
    """Number of exits of a cascade, 0 of any other model."""
    return len(getattr(model, "exits", ()))


def gmacs_per_exit(model: Any, whole: Count) -> list[float]:
    """Multiply-adds (1e9) up to each exit of a cascade, its earlier exits included.

    Args:
      whole: the count of all exits.
    """
    early = range(exits(model) - 1)
    return [*(count(model, whole.image_shape, upto=index).gmacs for index in early), whole.gmacs]


def _trace(model: Any, variables: Any, images: Any, upto: int | None) -> Sequence[Operation]:
    options = {} if upto is None else {"upto": upto}

    def logits(variables, images):
        out = model.apply(variables, images, **options)
        return getattr(out, "logits", out)

    jaxpr = jax.make_jaxpr(logits)(variables, images).jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    root = type(model).__name__
    for op in operations(live):
        yield dataclasses.replace(op, path=tuple(name for name in op.path if name != root))


def _tally(ops: Sequence[Operation], params: Mapping[str, int], shape: tuple[int, int, int]) -> Count:
    resize = sum(op.macs for op in ops if RESIZE in op.path)
    ops = [op for op in ops if RESIZE not in op.path]
    modules: dict[str, Macs] = {}
    for op in ops:
        if op.macs:
            path = "/".join(op.path)
            modules[path] = modules.get(path, Macs()) + _macs(op)
    whole = sum(modules.values(), Macs())
    return Count(
        total=whole.total,
        conv=whole.conv,
        dot=whole.dot,
        resize=resize,
        by_module=modules,
        by_block=_blocks(ops, params),
        stages=_stages(ops),
        params=sum(params.values()),
        by_params=params,
        image_shape=shape,
    )


def _macs(op: Operation) -> Macs:
    return Macs(**{op.kind: op.macs}) if op.kind else Macs()


def _name_of(op: Operation, pattern: re.Pattern[str]) -> str | None:
    """The path up to the component that matches, or None."""
    for depth, name in enumerate(op.path):
        if pattern.fullmatch(name):
            return "/".join(op.path[: depth + 1])
    return None


def _blocks(ops: Sequence[Operation], params: Mapping[str, int]) -> tuple[Block, ...]:
    held: dict[str, list[Operation]] = {}
    for op in ops:
        block = _name_of(op, BLOCK)
        if block is not None and _name_of(op, REDUCER) is None:
            held.setdefault(block, []).append(op)
    blocks = []
    for name, own in held.items():
        rows = [op.rows for op in own if op.rows and not added("/".join(op.path))] or [0]
        size = sum(n for path, n in params.items() if _within(path, name))
        blocks.append(Block(name, rows[0], rows[-1], sum(map(_macs, own), Macs()), size))
    return tuple(blocks)


def _stages(ops: Sequence[Operation]) -> tuple[Stage, ...]:
    """Cuts the program where a reducer first appears and, in a model that reduces, between its exits."""
    reduces = any(_name_of(op, REDUCER) for op in ops)
    spans: dict[tuple[str, str], list[Operation]] = {}
    costs: dict[tuple[str, str], int] = {}
    exit_, last = "", ""
    for op in ops:
        now = (reduces and _name_of(op, EXIT)) or exit_
        found = _name_of(op, REDUCER) or ""
        if now != exit_ or (found and (now, found) not in spans):
            exit_, last = now, found
        own = spans.setdefault((exit_, last), [])
        if found:
            costs[exit_, found] = costs.get((exit_, found), 0) + op.macs
        else:
            own.append(op)
    return tuple(_stage(own, costs.get(key, 0), key[0]) for key, own in spans.items())


def _stage(ops: Sequence[Operation], reducer: int, exit_: str) -> Stage:
    own = [op for op in ops if op.macs and _name_of(op, BLOCK)]
    names = dict.fromkeys(_name_of(op, BLOCK) for op in own)
    return Stage(
        tokens=next((op.rows for op in own if op.rows), 0),
        blocks=tuple(int(name.rpartition("_")[2]) for name in names),
        macs=sum(op.macs for op in own),
        reducer=reducer,
        exit=int(exit_.rpartition("_")[2]) if exit_ else None,
        names=tuple(names),
    )


def _params_by_module(variables: Mapping[str, Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables.get("params", {})):
        module = "/".join(str(key.key) for key in path[:-1])
        sizes[module] = sizes.get(module, 0) + math.prod(leaf.shape)
    return sizes


def _within(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(module + "/")
