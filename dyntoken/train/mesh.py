"""Many devices: one mesh axis, replicated state, a batch split by rows.

Nothing below decides a result: the step functions know only the axis name, and
every random draw is keyed by the global position of its row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
Tree = Any


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis `"data"` over the given devices, by default over all."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def check_batch(batch: int, mesh: Mesh, *, multiple: int = 1) -> None:
    """Raises ValueError unless every device gets the same number of rows.

    Args:
      batch: rows of the global batch.
      mesh: from `data_mesh`.
      multiple: what the rows of one device must divide by; 2 where mixup pairs
        neighbouring rows.
    """
    unit = mesh.size * multiple
    if batch > 0 and batch % unit == 0:
        return
    lower, upper = batch // unit * unit, (batch // unit + 1) * unit
    near = f"{lower} or {upper}" if lower > 0 else f"{upper}"
    pairs = f" in groups of {multiple} (mixup pairs neighbours)" if multiple > 1 else ""
    raise ValueError(
        f"a batch of {batch} does not divide over {mesh.size} devices{pairs}: set batch to {near}, "
        "or use another number of devices"
    )


def data_parallel(
    fn: Callable[..., Tree], mesh: Mesh, *, replicated: int, donate: Sequence[int] = ()
) -> Callable[..., Tree]:
    """Compiles a per-device function for a mesh.

    Args:
      fn: takes `replicated` replicated arguments, then one batch whose leaves
        are split by rows; returns replicated results (what differs between
        devices must have been reduced over the axis, which is checked).
      mesh: from `data_mesh`.
      replicated: number of leading arguments that every device holds whole.
      donate: positions of arguments whose memory the results may reuse.
    """
    specs = (PartitionSpec(),) * replicated + (PartitionSpec(AXIS),)
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    return jax.jit(mapped, donate_argnums=tuple(donate))


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, as global arrays split over the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """A tree of equal arrays on every device of the mesh, in buffers of their own."""
    sharding = NamedSharding(mesh, PartitionSpec())
    # By way of host copies: device_put would hand on the caller's own buffer (even with
    # may_alias=False), and whoever donates the result would delete it under the caller.
    copies = jax.tree.map(np.array, tree)
    if jax.process_count() == 1:
        return jax.device_put(copies, sharding)
    # device_put would compare every leaf over all processes; `hosts` did that once, by checksum.
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, global_shape=x.shape), copies
    )


def replicated_like(tree: Tree, mesh: Mesh) -> Tree:
    """Shapes and types of a tree with the replicated sharding (for restoring)."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def batch_like(
    mesh: Mesh, batch: int, shape: tuple[int, int, int], *, labels: int = 0
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a batch split over the mesh.

    Args:
      mesh: from `data_mesh`.
      batch: rows of the global batch.
      shape: `(H, W, C)` of an image.
      labels: classes, if the batch holds every label that fits; else 0.
    """
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    like = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    rows = {
        "image": like((batch, *shape), np.uint8),
        "label": like((batch,), np.int32),
        "mask": like((batch,), np.float32),
        "id": like((batch,), np.int32),
    }
    return rows | ({"labels": like((batch, labels), np.bool_)} if labels else {})
