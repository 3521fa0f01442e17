"""Early exit that really stops computing.

Wang et al. 2021 (DVT, arXiv 2105.15075) describe it; the released code
(blackfeather-wang/Dynamic-Vision-Transformer, `inference.py`) runs every exit on
every image and only counts what leaving would have saved. Here rows that are
sure leave: exit 0 runs on the whole batch, and the rows that stay are compacted
on the device, with the image and the upstream features and relations they need.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dyntoken.eval import exits
from dyntoken.eval.programs import Prepare, Programs, Result, ladder
from dyntoken.eval.waiting import Ring, Rows


@dataclasses.dataclass(frozen=True)
class Exits:
    """What a batch got, in the order of its images.

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


class Runner:
    """Runs a model with exits under thresholds; a row computes nothing after it has left.

    Call it with a batch, or give it a stream of batches. Either way
    every exit is a compiled program of static shape: exit 0 takes the whole
    batch, a later exit takes as many waiting rows as a bucket holds. Rows that
    are unsure are written into a ring of rows by the very program that computed
    them, and read from it by the program of the next exit. The host learns
    one boolean per row, exit and batch; logits follow behind the computation.

    Several devices: row r of a batch belongs to device r // (batch / devices)
    and stays there. All devices run the same program at the same time, its
    bucket the smallest that fits the fullest device.

    Memory: each exit but the first keeps room for two batches of images and
    upstream, allocated at first use and kept between calls.

    Attributes:
      batch: rows of a full batch.
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
        prepare: Prepare | None = None,
        seed: int = 0,
    ):
        """Nothing is compiled yet: the first use of a bucket does it, or `precompile`.

        Args:
          model: a model with exits: `dvt_...`, `multiexit_...`.
          variables: of the model.
          thresholds: `[E]`, in the unit of the rule; the last one decides nothing.
          rule: row of `exits.RULES`.
          batch: largest batch, divisible by the number of devices.
          steps: number of bucket sizes per exit.
          devices: of this process; by default all of them.
          prepare: uint8 images -> normalised float images, both `[b, H, W, C]`;
            with it, the images are uint8.
          seed: of the random rule.

        Raises:
          UnknownNameError: no such rule.
          ValueError: a model without exits, thresholds of the wrong length or
            NaN, no devices, or a batch that does not divide over them.
        """
        if not model.exits:
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
        self.rows = batch // len(devices)
        self.buckets = ladder(self.rows, steps)
        self._programs = Programs(
            model, variables, rule=rule, seed=seed, slots=2 * self.rows, devices=devices, prepare=prepare
        )
        self.thresholds = thresholds
        self._spare: list[Rows | None] | None = None

    @property
    def thresholds(self) -> np.ndarray:
        """float32 `[E]`. They may be set at any time: the programs take them as arguments."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, values: Any) -> None:
        self._thresholds = exits.check_thresholds(values, np.zeros((self._programs.exits, 1), np.float32))

    @property
    def programs(self) -> int:
        """Number of programs compiled so far."""
        return len(self._programs)

    def precompile(self) -> int:
        """Compiles all programs, one for exit 0 and one per later exit and bucket; returns their number."""
        self._programs.get(0, self.rows)
        for index, rows in itertools.product(range(1, self._programs.exits), self.buckets):
            self._programs.get(index, rows)
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
        run.absorb(run.push(images, leave))
        run.flush()
        (result,) = run.release()
        return result

    def stream(
        self, batches: Iterable[Any], *, leave: Iterable[Any] | None = None, start: int = 0
    ) -> Iterator[Exits]:
        """Runs batch after batch, with late exits at full buckets.

        Unsure rows wait, on their device, until a whole batch of them wants the
        same exit, so that its program always runs full; the rest is flushed
        through the buckets when the batches end. With several devices a
        program runs as soon as the fullest device has its share of a batch waiting.

        On the devices at most two batches of images and upstream wait per exit.
        The results of a batch are released in order, when its last row and those
        of all batches before have left; what waits for that is logits, on the host.

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
            run.settle()  # this and the caller's work overlap with the devices'
            yield from run.release()
            run.absorb(step)
            run.drain(1)
        run.flush()
        yield from run.release()

    # What goes in.

    def _place(self, images: Any, leave: Any, start: int) -> tuple[Rows, int]:
        """A batch on the devices, padded to full size, and its number of rows."""
        images = images if isinstance(images, jax.Array) else np.asarray(images)
        count = self._check(images)
        padding = self.batch - count
        if padding:
            images = np.pad(np.asarray(images), ((0, padding), (0, 0), (0, 0), (0, 0)))
        if images.dtype != self._programs.kind:
            images = images.astype(self._programs.kind)
        leave = np.full(count, -1, np.int32) if leave is None else self._check_leave(leave, count)
        number = np.arange(start, start + self.batch, dtype=np.int32)
        rows = Rows(images, None, np.pad(leave, (0, padding), constant_values=-1), number)
        return jax.device_put(rows, self._programs.split), count

    def _check(self, images: Any) -> int:
        if images.ndim != 4 or images.shape[1:] != self._programs.shape:
            wanted = ", ".join(map(str, self._programs.shape))
            raise ValueError(f"images must be [b, {wanted}] for this model, got shape {images.shape}")
        if not 1 <= len(images) <= self.batch:
            raise ValueError(f"{len(images)} images do not fit a runner for batches of 1 to {self.batch}")
        bytes_ = self._programs.kind == np.uint8
        if bytes_ != (images.dtype == np.uint8):
            raise ValueError(
                f"a runner with prepare takes uint8 images, got {images.dtype}"
                if bytes_
                else "uint8 images need a runner with prepare=..., which normalises them"
            )
        return len(images)

    def _check_leave(self, leave: Any, count: int) -> np.ndarray:
        leave = np.asarray(leave)
        if leave.shape != (count,) or leave.dtype.kind not in "iu":
            raise ValueError(
                f"leave must be {count} integers, one per image, got {leave.dtype} {leave.shape}"
            )
        if leave.min() < -1 or leave.max() >= self._programs.exits:
            raise ValueError(
                f"leave must name exits from 0 to {self._programs.exits - 1}, or -1 for the rule"
            )
        return leave.astype(np.int32)


class _Step(NamedTuple):
    """A program that was started: its exit, whose rows it got `[devices, rows]` (-1: padding), its result."""

    index: int
    ids: np.ndarray
    result: Result


@dataclasses.dataclass
class _Batch:
    """A batch whose results are being collected."""

    rows: int
    missing: int
    exits: Exits | None = None


class _Run:
    """One call or one stream: the rings, whose rows lie in them, and the results so far.

    A row's id is `batch number * batch size + row`.
    """

    def __init__(self, runner: Runner, start: int):
        self.runner, self.start = runner, start
        self.programs = runner._programs
        self.count = self.programs.exits
        self.rings: list[Rows | None] | None = None
        self.waiting = [Ring(self.programs.devices, 2 * runner.rows) for _ in range(self.count)]
        self.batches: dict[int, _Batch] = {}
        self.pushed = self.released = 0
        self.late: list[tuple[_Step, np.ndarray]] = []

    def push(self, images: Any, leave: Any) -> _Step:
        """Starts exit 0 on a batch."""
        runner = self.runner
        rows, count = runner._place(images, leave, self.start)
        if self.rings is None:
            self.rings = runner._spare or self.programs.rings()
            runner._spare = None  # one run at a time may write into them
        ids = np.arange(runner.batch)
        ids = np.where(ids < count, self.pushed * runner.batch + ids, -1).reshape(self.programs.devices, -1)
        self.batches[self.pushed] = _Batch(count, count)
        self.pushed += 1
        self.start += count
        valid = (ids >= 0).sum(axis=1)
        return self._start(0, ids, np.zeros_like(valid), valid, rows)

    def drain(self, first: int) -> None:
        """Runs the exits from `first` on, as long as a full bucket waits for one."""
        for index in range(first, self.count):
            while self.waiting[index].fullest >= self.runner.rows:
                self._advance(index, self.runner.rows)

    def flush(self) -> None:
        """Runs everything that waits, and hands the rings back."""
        runner = self.runner
        for index in range(1, self.count):
            while fullest := self.waiting[index].fullest:
                self._advance(index, next(b for b in runner.buckets if b >= min(fullest, runner.rows)))
                self.drain(index + 1)  # makes room
        runner._spare = self.rings or runner._spare

    def _advance(self, index: int, rows: int) -> None:
        ring = self.waiting[index]
        head, count = ring.head, np.minimum(ring.count, rows)
        self.absorb(self._start(index, ring.take(rows), head, count, self.rings[index]))

    def _start(self, index: int, ids: np.ndarray, head: np.ndarray, valid: np.ndarray, source: Rows) -> _Step:
        last = index + 1 == self.count
        tail = np.zeros_like(head) if last else self.waiting[index + 1].tail
        cursor = np.stack([head, valid, tail], axis=1).astype(np.int32)
        target = None if last else self.rings[index + 1]
        program = self.programs.get(index, ids.shape[1])
        threshold = self.runner.thresholds[index]
        result, target = program(self.programs.variables, threshold, cursor, source, target)
        if not last:
            self.rings[index + 1] = target
        return _Step(index, ids, result)

    def absorb(self, step: _Step) -> None:
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
        for number, rows in zip(
            *np.unique(step.ids[leaves] // self.runner.batch, return_counts=True), strict=True
        ):
            self.batches[int(number)].missing -= int(rows)
        self.late.append((step, leaves))

    def settle(self) -> None:
        """Copies the results of rows that left to where their batch collects them."""
        for step, leaves in self.late:
            number, row = np.divmod(step.ids[leaves], self.runner.batch)
            logits, score = (np.asarray(a)[leaves.ravel()] for a in step.result[:2])
            for which in np.unique(number):
                batch, mine = self.batches[int(which)], number == which
                if batch.exits is None:
                    batch.exits = Exits(
                        np.empty((batch.rows, logits.shape[1]), np.float32),
                        np.empty(batch.rows, np.int64),
                        np.empty(batch.rows, np.float32),
                    )
                batch.exits.logits[row[mine]] = logits[mine]
                batch.exits.exit[row[mine]] = step.index
                batch.exits.score[row[mine]] = score[mine]
        self.late = []

    def release(self) -> Iterator[Exits]:
        """The results of the batches that are complete, in order."""
        while self.released < self.pushed and not self.batches[self.released].missing:
            self.settle()
            result = self.batches.pop(self.released).exits
            odd = np.isnan(result.score) | ~(result.logits < np.inf).all(axis=-1)
            result.exit[odd], result.score[odd] = -1, np.nan
            self.released += 1
            yield result
