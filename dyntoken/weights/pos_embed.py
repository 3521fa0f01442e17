"""Position embeddings of another grid or another prefix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dyntoken.ops import resample
from dyntoken.weights.files import Bundle, WeightsError

Grid = tuple[int, int]
Fresh = Callable[[tuple[str, ...]], Mapping[str, Any]]
PREFIX = ("cls_token", "dist_token", "reg_token")


def fit_all(
    model: Any,
    found: dict[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    bundle: Bundle,
    method: str | None,
    source_grid: Grid | None,
    fresh: Fresh,
) -> list[str]:
    """Brings a source's position embeddings and relative biases to the model's sizes.

    Args:
      model: from `create_model`.
      found: arrays by the model's paths; those that do not fit are replaced.
      shapes: of the model, by path.
      bundle: the source.
      method, source_grid: see `load_weights`.
      fresh: returns the freshly initialised arrays of some paths.

    Returns:
      "path: old shape -> new shape" of each that was resized.
    """
    resized = []
    for path, old in list(found.items()):
        if path.endswith("pos_embed"):
            options = {"method": method, "source_grid": source_grid, "fresh": fresh}
            found[path] = _fitted(model, path, found, bundle, shapes[path], **options)
        elif path.endswith("relative_position_bias_table"):
            found[path] = fit_relative(old, shapes[path], method or model.plain().resize)
        if found[path] is not old:
            resized.append(f"{path}: {list(old.shape)} -> {list(found[path].shape)}")
    return resized


def _fitted(
    model: Any,
    path: str,
    found: dict[str, np.ndarray],
    bundle: Bundle,
    want: tuple[int, ...],
    *,
    method: str | None,
    source_grid: Grid | None,
    fresh: Fresh,
) -> np.ndarray:
    """The source's position embedding on the model's grid; itself if it fits."""
    value = found[path]
    exit_, nested, _ = path.partition("/backbone/")
    body = model.plain(int(exit_.removeprefix("exit_"))) if nested else model.plain()
    prefix, grid = body.positions_of(path)
    stored = bundle.metadata.get(f"grid/{exit_}") or bundle.metadata.get("grid", "")
    if source_grid is None and "x" in stored:
        source_grid = tuple(map(int, stored.split("x")))
    if source_grid is not None:  # that of the final tokens; those of earlier stages are finer
        source_grid = tuple(n * g // f for n, g, f in zip(source_grid, grid, body.grid, strict=True))
    if value.ndim != 3 or value.shape[-1] != want[-1]:
        return value  # reported with the other wrong shapes
    if value.shape == want and source_grid in (None, tuple(grid)):
        return value
    tokens = {key.rsplit("/", 1)[-1]: array for key, array in bundle.tensors.items()}
    rows = {name: tokens[name].shape[1] for name in PREFIX if name in tokens}
    bare = not getattr(body, "embed_class", True)  # all rows of its embedding are patches
    first = sum(rows.values()) if bare or prefix == body.prefix else prefix
    options = {"method": method or body.resize, "origin": bundle.origin, "bare": bare or not bundle.own}
    grids = {"prefix": body.prefix if bare else prefix, "grid": grid, "source_prefix": first}
    whole = fit(value, **grids, **options, source_grid=source_grid, fresh=lambda: fresh((path,))[path])
    if not bare:
        return whole
    at = 0
    for name, count in body.prefix_rows.items():  # what is added to them belongs to the tokens themselves
        token = f"{path.removesuffix('pos_embed')}{name}"
        if token in found and whole[:, at : at + count].any():
            found[token] = found[token] + whole[:, at : at + count]
        at += count
    return whole[:, body.prefix :]


def fit(
    value: np.ndarray,
    *,
    prefix: int,
    grid: Grid,
    source_prefix: int,
    source_grid: Grid | None,
    method: str,
    origin: str,
    bare: bool = False,
    fresh: Callable[[], np.ndarray] | None = None,
) -> np.ndarray:
    """Turns `value [1, source prefix + n, C]` into `[1, prefix + rows * columns, C]`.

    Prefix rows are copied; where the model has one more than the source, it
    comes from `fresh`. The grid part is resized as torch does it.

    Args:
      value: the source's embedding.
      prefix, grid: prefix rows and (rows, columns) of the model.
      source_prefix: prefix tokens of the source.
      source_grid: its grid where known; else its patches are taken as the
        model's grid if the number fits, or as a square.
      method: "bicubic", "bilinear" or "timm".
      origin: the source, for messages.
      bare: it may lack some prefix rows (those of registers in DINOv2) or all (DeiT-III,
        TPS's `no_embed_class`): then those are zero.
      fresh: returns a freshly initialised embedding of the model.

    Raises:
      WeightsError: no grid can be made out.
    """
    length, grid = value.shape[1], tuple(grid)
    for first in dict.fromkeys((source_prefix, min(source_prefix, 1), 0) if bare else (source_prefix,)):
        side = math.isqrt(max(length - first, 0))
        known = [source_grid] if source_grid is not None else [grid, (side, side)]
        fits = [tuple(g) for g in known if 0 < g[0] * g[1] == length - first]
        if fits:
            break
    else:
        raise WeightsError(
            f"{origin}: pos_embed has {length} rows, which with {source_prefix} prefix tokens make no square "
            "grid; pass source_grid=(rows, columns)"
        )
    rows, patches = value[:, :first], value[:, first:]
    if fits[0] != grid:
        patches = np.asarray(resample.resize_grid(jnp.asarray(patches), fits[0], grid, method))
    if first < min(prefix, source_prefix) or (first == 0 and prefix):
        rows = np.concatenate([rows, np.zeros((1, prefix - first, value.shape[-1]), value.dtype)], axis=1)
    elif first < prefix:
        if fresh is None:
            raise WeightsError(f"{origin}: pos_embed has {first} prefix rows, the model {prefix}")
        rows = np.concatenate([rows, np.asarray(fresh())[:, first:prefix]], axis=1)
    return np.concatenate([rows[:, :prefix], patches], axis=1)


def fit_relative(value: np.ndarray, want: tuple[int, ...], method: str) -> np.ndarray:
    """A bias per relative position `[(2w - 1)^2, heads]` of another window; `value` itself if it fits.

    microsoft/Swin-Transformer resizes it as a picture, bicubic. What is no square
    table for as many heads comes back unchanged.
    """
    sides = [math.isqrt(rows) for rows in (value.shape[0], want[0])]
    if value.ndim != 2 or value.shape == want or value.shape[1] != want[1] or sides[0] ** 2 != len(value):
        return value
    resized = resample.resize_grid(jnp.asarray(value)[None], (sides[0],) * 2, (sides[1],) * 2, method)
    return np.asarray(resized[0])
