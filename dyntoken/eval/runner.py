"""Early exit that really stops computing.

Wang et al. 2021 (DVT, arXiv 2105.15075) describe it; the released code
(blackfeather-wang/Dynamic-Vision-Transformer, `inference.py`) runs every exit on
every image and only counts what leaving would have saved. Here rows that are
sure leave: exit 0 runs on the whole batch, and the rows that stay are compacted
on the device, with the image and the upstream features and relations they need.

`Runner` checks and places batches and compiles one program per exit and bucket
of rows; `_Run` decides which program runs next and collects the results.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dyntoken.eval import exits
from dyntoken.eval.ring_buffer import Ring, Rows, put, take

Array = jax.Array
AXIS = "data"
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Exits:
    """The results of a batch, in the order of its images.

    Attributes:
      logits: float32 `[B, K]` of the exit that each image took.
      exit: int64 `[B]`, that exit; -1 for an image that no rule can score,
        because its logits are NaN or infinite: it went through to the last exit.
      score: float32 `[B]`, its score there, higher is surer (see `eval.exits`);
        NaN where `exit` is -1.
    """

    logits: np.ndarray
    exit: np.ndarray
    score: np.ndarray


class Result(NamedTuple):
    """What the program of one exit returns for its rows, on the devices."""

    logits: Array  # float32 [n, K]
    score: Array  # float32 [n]
    unsure: Array | None  # bool [n]; None at the last exit, which every row leaves


def ladder(batch: int, steps: int) -> tuple[int, ...]:
    """Bucket sizes: the multiples of `batch / steps`, rounded up, without duplicates.

    Powers of two would waste up to half of a bucket; eighths waste at most one
    eighth of the batch.
    """
    return tuple(sorted({-(-batch * step // steps) for step in range(1, steps + 1)}))


class Runner:
    """Runs a model with exits under thresholds; a row computes nothing after it has left.

    Call it with a batch, or give it a stream of batches. Every exit is a compiled
    program of static shape: exit 0 takes the whole batch, a later exit as many
    waiting rows as a bucket holds. Unsure rows are written into a ring buffer by
    the very program that computed them, and read from it by that of the next
    exit. The host learns one boolean per row, exit and batch; logits follow later.

    Row r of a batch belongs to device r // (batch / devices) and stays there. All
    devices run the same program at the same time, its bucket the smallest that
    fits the fullest device. Each exit but the first keeps room for two batches of
    images and upstream, allocated at first use and kept between calls.

    Attributes:
      batch: rows of a full batch.
      exits, devices: their numbers.
      rows: rows of a full batch per device.
      buckets: rows per device of the programs of the later exits.
      rule, seed: see `eval.exits`.
    """

    def __init__(
        self,
        model: Any,
        variables: Any,
        thresholds: Any,
        *,
        rule: str = "confidence",
        batch: int,
        steps: int = 8,
        devices: Sequence[jax.Device] | None = None,
        prepare: Callable[[Array], Array] | None = None,
        seed: int = 0,
    ):
        """Nothing is compiled yet: the first use of a bucket does it, or `precompile`.

        Args:
          model, variables: a model with exits: `dvt_...`, `multiexit_...`.
          thresholds: `[E]`, in the unit of the rule; the last one decides nothing.
          rule, seed: row of `exits.RULES`, and the seed of the random one.
          batch: largest batch, divisible by the number of devices.
          steps: number of bucket sizes per exit.
          devices: of this process; by default all of them.
          prepare: uint8 images -> normalised float images, both `[b, H, W, C]`.

        Raises:
          UnknownNameError: no such rule.
          ValueError: a model without exits, thresholds of the wrong length or
            NaN, no devices, or a batch that does not divide over them.
        """
        self.exits = len(getattr(model, "exits", ()))
        if not self.exits:
            name = getattr(model, "arch", type(model).__name__)
            raise ValueError(f"{name} has no exits to leave at: name a cascade, such as dvt_deit_small")
        exits.RULES[rule]  # an unknown name fails here
        devices = jax.local_devices() if devices is None else list(devices)
        if not devices or len(set(devices)) < len(devices):
            raise ValueError(
                f"devices={devices}: give at least one device, each once (None takes all of this process)"
            )
        if batch < 1 or batch % len(devices):
            raise ValueError(
                f"a batch of {batch} does not divide over {len(devices)} devices: "
                "choose a multiple, or name fewer devices"
            )
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.batch, self.rule, self.seed = batch, rule, seed
        self.devices, self.rows = len(devices), batch // len(devices)
        self.buckets = ladder(self.rows, steps)
        self.thresholds = thresholds
        self._model, self._prepare, self._shape = model, prepare, tuple(model.input_shape)
        self._dtype = np.dtype(np.float32 if prepare is None else np.uint8)
        auto = (AxisType.Auto,)
        self._mesh = jax.make_mesh((self.devices,), (AXIS,), axis_types=auto, devices=devices)
        self._split = NamedSharding(self._mesh, SPLIT)
        self._variables = jax.device_put(variables, NamedSharding(self._mesh, WHOLE))
        self._compiled: dict[tuple[int, int], Any] = {}
        self._spare: list[Rows | None] | None = None  # ring buffers that no run writes into

    @property
    def thresholds(self) -> np.ndarray:
        """float32 `[E]`. They may be set at any time: the programs take them as arguments."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, values: Any) -> None:
        self._thresholds = exits.check_thresholds(values, np.zeros((self.exits, 1), np.float32))

    @property
    def programs(self) -> int:
        """Number of programs compiled so far."""
        return len(self._compiled)

    def precompile(self) -> int:
        """Compiles all programs, one for exit 0 and one per later exit and bucket; returns their number."""
        self._program(0, self.rows)
        for index, rows in itertools.product(range(1, self.exits), self.buckets):
            self._program(index, rows)
        return self.programs

    def __call__(self, images: Any, *, leave: Any = None, start: int = 0) -> Exits:
        """Runs one batch.

        Args:
          images: `[b, H, W, C]` with 1 <= b <= batch, float and normalised, or
            uint8 if the runner has `prepare`. A short batch is padded and masked.
          leave: `[b]` integers, the exit where each image leaves whatever its
            score (-1: as the rule says); forces shares for timing and tests.
          start: number of the first image in its set (keys the random rule).

        Raises:
          ValueError: images of another shape or type, or more than a batch.
        """
        run = _Run(self, start)
        run.book(run.push(images, leave))
        run.flush()
        (result,) = run.release()
        return result

    def stream(
        self, batches: Iterable[Any], *, leave: Iterable[Any] | None = None, start: int = 0
    ) -> Iterator[Exits]:
        """Runs batch after batch, with late exits at full buckets.

        Unsure rows wait, on their device, until a whole batch of them wants the
        same exit (with several devices, until the fullest has its share of one);
        what is left when the batches end goes through the buckets. The results of
        a batch come when its last row and those of all batches before have left.

        Args:
          batches: as `images` of a call; any of them may be short.
          leave: one entry per batch, as `leave` of a call.
          start: number of the very first image.

        Yields:
          One `Exits` per batch, in order.
        """
        run = _Run(self, start)
        pairs = zip(batches, leave, strict=True) if leave is not None else ((b, None) for b in batches)
        for images, forced in pairs:
            step = run.push(images, forced)
            run.collect()  # this and the caller's work overlap with the devices'
            yield from run.release()
            run.book(step)
            run.drain(1)
        run.flush()
        yield from run.release()

    def _place(self, images: Any, leave: Any, start: int) -> tuple[Rows, int]:
        """A checked batch on the devices, padded to full size, and its number of images."""
        images = images if isinstance(images, jax.Array) else np.asarray(images)
        if images.ndim != 4 or images.shape[1:] != self._shape:
            wanted = ", ".join(map(str, self._shape))
            raise ValueError(f"images must be [b, {wanted}] for this model, got shape {images.shape}")
        count = len(images)
        if not 1 <= count <= self.batch:
            raise ValueError(f"{count} images do not fit a runner for batches of 1 to {self.batch}")
        if (self._dtype == np.uint8) != (images.dtype == np.uint8):
            raise ValueError(
                "uint8 images need a runner with prepare=..., which normalises them"
                if images.dtype == np.uint8
                else f"a runner with prepare takes uint8 images, got {images.dtype}"
            )
        leave = np.full(count, -1, np.int32) if leave is None else np.asarray(leave)
        if leave.shape != (count,) or leave.dtype.kind not in "iu":
            raise ValueError(
                f"leave must be {count} integers, one per image, got {leave.dtype} {leave.shape}"
            )
        if leave.min() < -1 or leave.max() >= self.exits:
            raise ValueError(f"leave must name exits from 0 to {self.exits - 1}, or -1 for the rule")
        padding = self.batch - count
        if padding:
            images = np.pad(np.asarray(images), ((0, padding), (0, 0), (0, 0), (0, 0)))
        leave = np.pad(leave.astype(np.int32), (0, padding), constant_values=-1)
        number = np.arange(start, start + self.batch, dtype=np.int32)
        rows = Rows(images.astype(self._dtype, copy=False), None, leave, number)
        return jax.device_put(rows, self._split), count

    # The programs, one per exit and bucket.

    def _program(self, index: int, rows: int) -> Any:
        """Exit `index` for `rows` rows per device, compiled when it is asked for first; see `_step`."""
        if (index, rows) not in self._compiled:
            last = index + 1 == self.exits
            mapped = jax.shard_map(
                functools.partial(self._step, index=index, rows=rows),
                mesh=self._mesh,
                in_specs=(WHOLE, WHOLE, SPLIT, SPLIT, SPLIT),
                out_specs=(Result(SPLIT, SPLIT, None if last else SPLIT), SPLIT),
            )
            lowered = jax.jit(mapped, donate_argnums=4).lower(
                self._variables,
                jax.ShapeDtypeStruct((), np.float32),
                jax.ShapeDtypeStruct((self.devices, 3), np.int32, sharding=self._split),
                self._like(index),
                None if last else self._like(index + 1),
            )
            self._compiled[index, rows] = lowered.compile()
        return self._compiled[index, rows]

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
        """One exit (static `index`) on one device, for a bucket of static `rows`: decides which of them leave.

        It reads from `source`, the batch itself (exit 0) or the ring buffer of rows that wait, and writes
        the others into `target`, that of the next exit. `cursor` int32 `[1, 3]` holds the first slot of the source,
        its valid rows, and the first free slot of the target.
        """
        head, valid, tail = cursor[0]
        if index:
            source = take(source, head, rows)
        logits, upstream = self._apply(variables, source.images, source.upstream, index)
        score = exits.step_score(self.rule, logits, exit_=index, numbers=source.number, seed=self.seed)
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

    def _like(self, index: int) -> Rows:
        """Shapes and types of what exit `index` reads: exit 0 a batch, the others their ring buffer."""
        rows = 2 * self.rows if index else self.rows
        images, upstream = jax.ShapeDtypeStruct((rows, *self._shape), self._dtype), None
        for before in range(index):
            apply = functools.partial(self._apply, index=before)
            _, upstream = jax.eval_shape(apply, self._variables, images, upstream)
        number = jax.ShapeDtypeStruct((rows,), np.int32)

        def on_all(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = (self.devices * leaf.shape[0], *leaf.shape[1:])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=self._split)

        return jax.tree.map(on_all, Rows(images, upstream, number, number))

    def _buffers(self) -> list[Rows | None]:
        """Empty ring buffers of all exits; the first needs none."""
        # By way of host zeros, which cost nothing before they are touched; jnp.zeros would compile.
        zeros = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)  # noqa: E731
        return [None, *(jax.tree.map(zeros, self._like(index)) for index in range(1, self.exits))]


class _Step(NamedTuple):
    """A program that was started: its exit, the ids of its rows `[devices, rows]` (-1: padding), its result."""

    index: int
    ids: np.ndarray
    result: Result


class _Run:
    """One call or one stream: which rows wait where, and the results so far.

    A row's id is `batch number * batch size + row`.
    """

    def __init__(self, runner: Runner, start: int):
        self.runner, self.start = runner, start
        self.buffers: list[Rows | None] | None = None
        self.waiting = [Ring(runner.devices, 2 * runner.rows) for _ in range(runner.exits)]
        self.results: dict[int, Exits] = {}  # by batch number
        self.missing: dict[int, int] = {}  # rows of a batch that have not left yet
        self.pushed = self.released = 0
        self.late: list[tuple[_Step, np.ndarray]] = []  # results still on the devices, and which rows count

    def push(self, images: Any, leave: Any) -> _Step:
        """Starts exit 0 on a batch."""
        runner = self.runner
        rows, count = runner._place(images, leave, self.start)
        if self.buffers is None:  # one run at a time may write into them
            self.buffers, runner._spare = runner._spare or runner._buffers(), None
        ids = np.arange(runner.batch)
        ids = np.where(ids < count, self.pushed * runner.batch + ids, -1).reshape(runner.devices, -1)
        valid = (ids >= 0).sum(axis=1)
        step = self._launch(0, ids, np.zeros_like(valid), valid, rows)
        logits = np.empty((count, step.result.logits.shape[1]), np.float32)
        self.results[self.pushed] = Exits(logits, np.empty(count, np.int64), np.empty(count, np.float32))
        self.missing[self.pushed] = count
        self.pushed += 1
        self.start += count
        return step

    def drain(self, first: int) -> None:
        """Runs the exits from `first` on, as long as a full bucket waits for one."""
        for index in range(first, self.runner.exits):
            while self.waiting[index].fullest >= self.runner.rows:
                self._advance(index, self.runner.rows)

    def flush(self) -> None:
        """Runs everything that waits, and hands the ring buffers back."""
        runner = self.runner
        for index in range(1, runner.exits):
            while fullest := self.waiting[index].fullest:
                self._advance(index, next(b for b in runner.buckets if b >= min(fullest, runner.rows)))
                self.drain(index + 1)  # makes room
        runner._spare = self.buffers or runner._spare

    def _advance(self, index: int, rows: int) -> None:
        ring = self.waiting[index]
        head, count = ring.head, np.minimum(ring.count, rows)
        self.book(self._launch(index, ring.take(rows), head, count, self.buffers[index]))

    def _launch(
        self, index: int, ids: np.ndarray, head: np.ndarray, valid: np.ndarray, source: Rows
    ) -> _Step:
        last = index + 1 == self.runner.exits
        tail = np.zeros_like(head) if last else self.waiting[index + 1].tail
        cursor = np.stack([head, valid, tail], axis=1).astype(np.int32)
        target = None if last else self.buffers[index + 1]
        program, threshold = self.runner._program(index, ids.shape[1]), self.runner.thresholds[index]
        result, target = program(self.runner._variables, threshold, cursor, source, target)
        if not last:
            self.buffers[index + 1] = target
        return _Step(index, ids, result)

    def book(self, step: _Step) -> None:
        """Waits for a program's decisions, the one small transfer, and books them."""
        unsure = np.zeros(step.ids.shape, bool)
        if step.result.unsure is not None:
            unsure = np.asarray(step.result.unsure).reshape(step.ids.shape)
            self.waiting[step.index + 1].put(step.ids, unsure)
        leaves = (step.ids >= 0) & ~unsure
        if not leaves.any():
            return
        for array in step.result[:2]:
            array.copy_to_host_async()
        numbers, counts = np.unique(step.ids[leaves] // self.runner.batch, return_counts=True)
        for number, rows in zip(numbers.tolist(), counts.tolist(), strict=True):
            self.missing[number] -= rows
        self.late.append((step, leaves))

    def collect(self) -> None:
        """Copies the results of rows that left to where their batch collects them."""
        for step, leaves in self.late:
            number, row = np.divmod(step.ids[leaves], self.runner.batch)
            logits, score = (np.asarray(a)[leaves.ravel()] for a in step.result[:2])
            for which in np.unique(number):
                result, mine = self.results[int(which)], number == which
                result.logits[row[mine]] = logits[mine]
                result.exit[row[mine]] = step.index
                result.score[row[mine]] = score[mine]
        self.late.clear()

    def release(self) -> Iterator[Exits]:
        """The results of the batches that are complete, in order."""
        while self.missing.get(self.released) == 0:
            self.collect()
            result = self.results.pop(self.released)
            odd = np.isnan(result.score) | ~(result.logits < np.inf).all(axis=-1)
            result.exit[odd], result.score[odd] = -1, np.nan
            self.released += 1
            yield result
