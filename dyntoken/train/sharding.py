"""Many devices: one mesh axis, replicated state, a batch split by rows.

Nothing below decides a result: the step functions know only the axis name, and
every random draw is keyed by the global position of its row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
# What a run may cut over the devices, and which parts of its state that is.
SHARDS = {"none": (), "optimizer": ("opt_state", "ema"), "params": ("opt_state", "ema", "params")}
Tree = Any


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis `"data"` over the given devices, by default over all."""
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("devices=[] leaves nothing to run on: name at least one, or None for all")
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def describe_devices(devices: Sequence[jax.Device]) -> str:
    """Number, platform and kind of the devices of a run."""
    first, count = devices[0], len(devices)
    if first.platform == "cpu":
        one = "1 x cpu" if count == 1 else f"{count} x cpu, virtual devices that share this machine's cores"
    else:
        one = f"{count} x {first.platform} ({first.device_kind})"
    processes = jax.process_count()
    return one if processes == 1 else f"{one}, of {processes} processes"


def check_batch(batch: int, mesh: Mesh, *, multiple: int = 1, slices: int = 1, shards: int = 1) -> int:
    """Raises ValueError unless every device gets the same number of rows; returns what batches are multiples of.

    Args:
      multiple: what the rows of one slice must divide by; 2 where mixup pairs
        neighbouring rows.
      slices: of the rows of one device, see `config.accumulate`.
      shards: of the data, which a batch must divide by as well; what is proposed does.
    """
    unit = mesh.size * multiple * slices
    if batch > 0 and batch % unit == 0:
        return math.lcm(unit, shards)
    unit = math.lcm(unit, shards)
    lower, upper = batch // unit * unit, (batch // unit + 1) * unit
    near = f"{lower} or {upper}" if lower > 0 else f"{upper}"
    why = ["mixup pairs neighbours"] * (multiple > 1) + [f"accumulate={slices}"] * (slices > 1)
    pairs = f" in groups of {multiple * slices} ({', '.join(why)})" if why else ""
    over = f"{mesh.size} device{'s' * (mesh.size > 1)}{pairs}"
    raise ValueError(
        f"a batch of {batch} does not divide over {over}: set batch to {near}, "
        "or use another number of devices"
    )


def data_parallel(
    fn: Callable[..., Tree], mesh: Mesh, *, replicated: int, donate: Sequence[int] = (), rows: bool = False
) -> Callable[..., Tree]:
    """Compiles a per-device function for a mesh.

    Args:
      fn: takes `replicated` replicated arguments, then one batch whose leaves
        are split by rows; returns replicated results (what differs between
        devices must have been reduced over the axis, which is checked).
      replicated: number of leading arguments that every device holds whole.
      donate: positions of arguments whose memory the results may reuse.
      rows: `fn` returns a pair, of which the second is split by rows.
    """
    specs = (PartitionSpec(),) * replicated + (PartitionSpec(AXIS),)
    results = (PartitionSpec(), PartitionSpec(AXIS)) if rows else PartitionSpec()
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=results)
    return jax.jit(mapped, donate_argnums=tuple(donate))


def split_update(
    gradient: Callable[..., Tree],
    update: Callable[[Tree, Tree], tuple[Tree, Tree]],
    mesh: Mesh,
    layout: Tree,
) -> Callable[..., Tree]:
    """Compiles a training step whose state lies in pieces on the devices.

    The gradient half runs per device as ever. The update half is outside of the
    `shard_map`, ordinary arithmetic on global arrays: told where the pieces lie,
    the compiler keeps it local (each device updates what it holds), makes the
    all-gathers and turns norms into one more sum. So any optimizer works that
    works on whole arrays; collectives by hand would need one that knows which
    piece it sees.

    Args:
      gradient, update: `(step, variables, teacher, batch) -> result` and `(state, result) -> (state, metrics)`.
      layout: a state of shardings, from `state_sharding`.
    """
    specs = (PartitionSpec(),) * 3 + (PartitionSpec(AXIS),)
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())

    def step(state, teacher, batch):
        result = mapped(state.step, state.variables, teacher, batch)
        # Cut before the update, not after: the moments then never leave their device.
        pieces = jax.tree.map(lambda x: shard_longest_axis(x, mesh), result.grads)
        return update(state, result._replace(grads=jax.lax.with_sharding_constraint(result.grads, pieces)))

    return jax.jit(step, donate_argnums=(0,), out_shardings=(layout, NamedSharding(mesh, PartitionSpec())))


def shard_longest_axis(leaf: Any, mesh: Mesh) -> NamedSharding:
    """An array cut along its longest axis that divides over the devices, else whole on each."""
    fits = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0 and size > 0]
    if not fits or mesh.size == 1:
        return NamedSharding(mesh, PartitionSpec())
    longest = max(fits, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, AXIS))


def state_sharding(state: Tree, mesh: Mesh, shard: str) -> Tree:
    """A tree of shardings for a `TrainState`.

    Args:
      state: arrays, or their shapes and types.
      shard: row of `SHARDS`. With "params" each step gathers the parameters once.
    """
    whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state)
    cut = {
        name: jax.tree.map(lambda x: shard_longest_axis(x, mesh), getattr(state, name))
        for name in SHARDS[shard]
    }
    return whole.replace(**cut)


def replicate_all(tree: Tree) -> Tree:
    """The same arrays, whole on every device; all processes call it together."""
    leaves, structure = jax.tree.flatten(tree)
    cut = [x for x in leaves if not x.is_fully_replicated]
    if not cut:
        return tree
    # One program for all, and its end awaited: of many started at once, each with a collective, CPU
    # devices that share few threads may each wait for another one, for ever.
    copies = _copies(NamedSharding(cut[0].sharding.mesh, PartitionSpec()))
    whole = iter(jax.block_until_ready(copies(cut)))
    return jax.tree.unflatten(structure, [x if x.is_fully_replicated else next(whole) for x in leaves])


@functools.cache
def _copies(where: NamedSharding) -> Callable[[list[jax.Array]], list[jax.Array]]:
    return jax.jit(lambda arrays: arrays, out_shardings=where)


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, as global arrays split over the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}


def replicate(tree: Tree, mesh: Mesh, layout: Tree | None = None) -> Tree:
    """A tree of arrays, the same on every process, on the devices of the mesh, in buffers of their own.

    Args:
      layout: a tree of shardings; by default every device holds all.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    # By way of host copies: device_put would hand on the caller's own buffer (even with
    # may_alias=False), and whoever donates the result would delete it under the caller.
    copies = jax.tree.map(np.array, tree)
    layout = jax.tree.map(lambda _: sharding, copies) if layout is None else layout
    if jax.process_count() == 1:
        return jax.device_put(copies, layout)
    # device_put would compare every leaf over all processes; a checksum did that once.
    return jax.tree.map(
        lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index]), copies, layout
    )


def abstract(tree: Tree, mesh: Mesh, layout: Tree | None = None) -> Tree:
    """Shapes, types and places of a tree (for compiling and restoring); by default every device holds all."""
    if layout is None:
        layout = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, layout)


def abstract_batch(
    mesh: Mesh, batch: int, shape: tuple[int, int, int], *, labels: int = 0
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a batch split over the mesh.

    Args:
      labels: classes, if the batch holds every label that fits; else 0.
    """
    rows = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec(AXIS)))
    made = {
        "image": rows((batch, *shape), np.uint8),
        "label": rows((batch,), np.int32),
        "mask": rows((batch,), np.float32),
        "id": rows((batch,), np.int32),
    }
    return made | ({"labels": rows((batch, labels), np.bool_)} if labels else {})
