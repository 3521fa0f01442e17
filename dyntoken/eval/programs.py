"""The compiled programs of the early-exit runner: one per exit and bucket."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dyntoken.eval import exits
from dyntoken.eval.waiting import Rows, put, take

AXIS = "data"
Array = jax.Array
Prepare = Callable[[Array], Array]


class Result(NamedTuple):
    """What the program of one exit returns for its rows, on the devices."""

    logits: Array  # float32 [n, K]
    score: Array  # float32 [n]
    unsure: Array | None  # bool [n]; None at the last exit, which everybody leaves


def ladder(batch: int, steps: int) -> tuple[int, ...]:
    """Bucket sizes: the multiples of `batch / steps`, rounded up, without duplicates.

    Powers of two would waste up to half of a bucket; eighths waste at most one
    eighth of the batch.
    """
    return tuple(sorted({-(-batch * step // steps) for step in range(1, steps + 1)}))


class Programs:
    """Compiles the exits of a model for static numbers of rows, over one mesh axis.

    A program reads its rows from a ring (exit 0: from the batch), runs one exit,
    scores it, and writes the rows that stay into the ring of the next exit, in
    place. Nothing crosses devices.

    Attributes:
      exits: their number.
      devices: their number.
      shape: (height, width, channels) of an image.
      kind: type of the images, uint8 with `prepare`, else float32.
      split: sharding of everything that has rows in front.
      variables: of the model, on every device.
    """

    def __init__(
        self,
        model: Any,
        variables: Any,
        *,
        rule: str,
        seed: int,
        slots: int,
        devices: Sequence[jax.Device],
        prepare: Prepare | None,
    ):
        """See `cascade.Runner`; `slots` is the size of a ring, per device."""
        self.exits, self.devices = len(model.exits), len(devices)
        self.shape = model.input_shape
        self.kind = np.dtype(np.float32 if prepare is None else np.uint8)
        self._model, self._rule, self._seed, self._slots, self._prepare = model, rule, seed, slots, prepare
        auto = (AxisType.Auto,)
        self._mesh = jax.make_mesh((self.devices,), (AXIS,), axis_types=auto, devices=devices)
        self.split = NamedSharding(self._mesh, PartitionSpec(AXIS))
        self.variables = jax.device_put(variables, NamedSharding(self._mesh, PartitionSpec()))
        self._compiled: dict[tuple[int, int], Any] = {}

    def __len__(self) -> int:
        """Number of programs compiled so far."""
        return len(self._compiled)

    def get(self, index: int, rows: int) -> Any:
        """The program of exit `index` for `rows` rows per device, compiled when it is asked for first.

        It takes `(variables, threshold, cursor, source, target)` and returns
        `(Result, target)`, see `_step`; the target that goes in is used up.
        """
        if (index, rows) not in self._compiled:
            self._compiled[index, rows] = self._compile(index, rows)
        return self._compiled[index, rows]

    def rings(self) -> list[Rows | None]:
        """Empty rings of all exits; the first needs none."""
        # By way of host zeros, which cost nothing before they are touched; jnp.zeros would compile.
        zeros = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)  # noqa: E731
        return [None, *(jax.tree.map(zeros, self._like(i, self._slots)) for i in range(1, self.exits))]

    def _compile(self, index: int, rows: int) -> Any:
        last = index + 1 == self.exits
        split, whole = PartitionSpec(AXIS), PartitionSpec()
        mapped = jax.shard_map(
            functools.partial(self._step, index=index, rows=rows),
            mesh=self._mesh,
            in_specs=(whole, whole, split, split, split),
            out_specs=(Result(split, split, None if last else split), split),
        )
        source = self._like(index, self._slots if index else rows)
        target = None if last else self._like(index + 1, self._slots)
        threshold = jax.ShapeDtypeStruct((), np.float32)
        cursor = jax.ShapeDtypeStruct((self.devices, 3), np.int32, sharding=self.split)
        program = jax.jit(mapped, donate_argnums=4)
        return program.lower(self.variables, threshold, cursor, source, target).compile()

    def _step(
        self,
        variables: Any,
        threshold: Array,
        cursor: Array,
        source: Rows,
        target: Rows | None,
        *,
        index: int,
        rows: int,
    ) -> tuple[Result, Rows | None]:
        """One exit on one device.

        Args:
          threshold: float32 scalar.
          cursor: int32 `[1, 3]`: first slot of the source, valid rows, first free slot of the target.
          source: the batch itself (exit 0), or the ring of rows that wait for this exit.
          target: the ring of the next exit.
          index, rows: exit and bucket (static).
        """
        head, valid, tail = cursor[0]
        if index:
            source = take(source, head, rows)
        logits, upstream = self._apply(variables, source.images, source.upstream, index)
        score = exits.step_score(self._rule, logits, exit_=index, numbers=source.number, seed=self._seed)
        if target is None:
            return Result(logits, score, None), None
        leaves = jnp.where(source.leave < 0, score >= threshold, source.leave <= index)
        unsure = (jnp.arange(rows) < valid) & ~leaves  # padding never counts
        target = put(target, tail, source._replace(upstream=upstream), unsure)
        return Result(logits, score, unsure), target

    def _apply(self, variables: Any, images: Array, upstream: Any, index: int) -> tuple[Array, Any]:
        """Float32 logits, and upstream: None where it has no leaf (a model without reuse)."""
        images = images if self._prepare is None else self._prepare(images)
        logits, upstream = self._model.apply(variables, images, upstream, index=index, method="step")
        return logits.astype(jnp.float32), upstream if jax.tree.leaves(upstream) else None

    def _like(self, index: int, rows: int) -> Rows:
        """Shapes and types of what exit `index` takes, `rows` per device, over all devices."""
        images, upstream = jax.ShapeDtypeStruct((rows, *self.shape), self.kind), None
        for before in range(index):
            apply = functools.partial(self._apply, index=before)
            _, upstream = jax.eval_shape(apply, self.variables, images, upstream)
        number = jax.ShapeDtypeStruct((rows,), np.int32)

        def on_all(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = (self.devices * leaf.shape[0], *leaf.shape[1:])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=self.split)

        return jax.tree.map(on_all, Rows(images, upstream, number, number))
