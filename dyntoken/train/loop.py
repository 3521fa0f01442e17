"""The training loop, callable from a notebook: `run(config, workdir)`.

Rerunning the same command goes on where the run stopped. A run starts from the
first of these that is given: its own workdir, `config.resume` (another run),
`config.init` (weights), fresh variables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from dyntoken import data, interrupt, paths
from dyntoken.train import hosts, identity, sharding
from dyntoken.train.build import Run, build
from dyntoken.train.checkpoint import Checkpoints
from dyntoken.train.compiled import Programs, state_bytes
from dyntoken.train.evaluate import average_warning, check_finite, check_sets, measure
from dyntoken.train.keeper import Keeper
from dyntoken.train.lock import Lock
from dyntoken.train.logging import Report, Value, silent
from dyntoken.train.profiler import Tracer, Window
from dyntoken.train.start import beginning, facts, load_teacher, move_aside, start, write_config
from dyntoken.train.state import TrainState
from dyntoken.train.stop import Stop
from dyntoken.train.watch import NotFiniteError, Watch

Log = Callable[[str], None]
Batches = Iterator[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
      state: after the last step.
      metrics: of the final evaluation (`top1`, ... and `ema/top1`, ...; lists
        where there is a value per exit); empty if the run was stopped before
        its end.
      model: the module; `model.apply(result.state.variables, images)`.
      run: what was run.
      workdir: folder of the run.
      finished: False if a signal stopped it; rerun to go on.
      signum: of that signal; 0 if it finished.
    """

    state: TrainState
    metrics: dict[str, Value]
    model: nn.Module
    run: Run
    workdir: epath.Path
    finished: bool
    signum: int = 0


def run(
    config: Mapping[str, Any], workdir: str | epath.PathLike, *, restart: bool = False, log: Log = print
) -> Result:
    """Trains, evaluates and checkpoints; resumes by itself.

    Args:
      config: see `run.Settings`.
      workdir: folder of the run, made if absent; may be on `gs://`.
      restart: start anew; what is in the workdir is moved to `<workdir>/old/N`.
      log: takes one line of text.

    Raises:
      TrainError: when the loss or the gradient stops being finite, and
        `config.rewind` allows no (further) rewind.
      ValueError: for what does not fit together, before anything is written; for a last evaluation that is
        not finite.
      CheckpointError: when the workdir holds another run, or only damaged files.
      LockedError: when another run writes to the workdir.
      StorageError: when a checkpoint cannot be read, or the disk is full.
      WorkdirError: when nothing, or no checkpoint, can be written to the workdir.
      HostError: when the processes differ in data, config, weights or workdir.
      ImportError: when `config.tensorboard` lacks its library.
    """
    log = log if jax.process_index() == 0 else silent
    run = hosts.agree(lambda: build(config), facts)
    workdir = hosts.agree(lambda: paths.resolve(workdir))
    hosts.check_workdir(workdir, need=state_bytes(run))
    with contextlib.ExitStack() as stack:
        lock = Lock(workdir, log)
        hosts.agree(lambda: stack.enter_context(lock) if jax.process_index() == 0 else None)
        if restart:
            hosts.agree(lambda: move_aside(workdir, log))
        session = _Session(run, workdir, lock, log, stack)
        state, stopped = session.state, False
        if int(state.step) < run.total_steps:
            state, stopped = session.train(state)
        if not session.save_last(state) or stopped:
            again = interrupt.go_on() or ": run the same command again to go on"
            log(f"stopped by a signal after step {int(state.step)}, which is saved{again}")
            signum = session.stop.signum or signal.SIGTERM  # of several processes, to another one
            return Result(state, {}, run.model, run, workdir, finished=False, signum=signum)
        return Result(state, session.finish(state), run.model, run, workdir, finished=True)


class _Session:
    """One life of a run, from its start or restart to its end or interruption."""

    def __init__(self, run: Run, workdir: epath.Path, lock: Lock, log: Log, stack: contextlib.ExitStack):
        settings = run.settings
        self.run, self.workdir, self.lock, self.log = run, workdir, lock, log
        self.keeper = Keeper(run)
        self.report = hosts.agree(
            lambda: Report(
                workdir,
                total=run.total_steps,
                batch=settings.batch,
                board=settings.tensorboard,
                curves=settings.curves,
                log=log,
            )
        )
        stack.callback(self.report.close)
        self.checkpoints = Checkpoints(
            workdir, keep=settings.keep_checkpoints, also=self.keeper.choose, log=log
        )
        stack.callback(self.checkpoints.close)
        self.stop = Stop()
        identity.check(workdir, run)
        begun = start(run, self.checkpoints, log)
        self.state, self.clock, self.rewinds = begun.state, begun.clock, begun.rewinds
        self.first = int(begun.state.step)
        self.finished_before = begun.same and self.first >= run.total_steps
        self._take_up(self.first, begun.meta)
        write_config(workdir, run)

    def _take_up(self, step: int, meta: Mapping[str, Any]) -> None:
        """Makes the records those of a run that is at this step, with `meta` of its checkpoint."""
        self.report.resume(step)
        self.keeper.read(self.report.rows(), meta.get("scores"))
        self.watch = Watch(meta.get("sums"))

    def train(self, state: TrainState) -> tuple[TrainState, bool]:
        """Takes the steps that are left; returns the last state and whether a signal stopped it.

        Raises:
          TrainError: see `run`.
        """
        # Both: a set that is missing must not show up after the training.
        batches, _ = hosts.agree(lambda: (self._batches(self.first), check_sets(self.run)))
        teacher = load_teacher(self.run, self.log)
        programs = Programs(self.run, self.log)
        self.state = None  # the first step consumes it
        while True:
            try:
                return self._steps(programs, teacher, state, batches)
            except NotFiniteError as error:
                bad = error.with_traceback(None)  # whose frames hold the state
            del state, batches
            state = self._go_back(bad)
            batches = self._batches(int(state.step))

    def _batches(self, step: int) -> Batches:
        return self.run.train_batches(step, **self.rewinds.data)

    def _steps(
        self, programs: Programs, teacher: Any, state: TrainState, batches: Batches
    ) -> tuple[TrainState, bool]:
        run, settings, total, first = self.run, self.run.settings, self.run.total_steps, int(state.step)
        watch, metrics = self.watch, None
        tracer = Tracer(Window.of(settings.profile), self.workdir, self.log)
        train_step = programs.at(first)
        self.clock.start(first)
        with data.prefetch(batches) as batches, contextlib.closing(tracer), self.stop:
            for step in range(first + 1, total + 1):
                if not programs.ready(step - 1):
                    with self.clock:
                        train_step = programs.at(step - 1)
                tracer.before(step, metrics)
                batch = self.clock.take(batches, running=metrics)
                state, metrics = train_step(state, teacher, sharding.place(batch, run.mesh))
                tracer.after(step, metrics)
                watch.add(step, metrics)
                stopping = self.stop.asked or self.checkpoints.preempted(step)
                if step % settings.log_steps == 0 or step == total:
                    lr = float(run.lr_fn(step - 1))
                    self.report.train(step, watch.means(), lr=lr, clock=self.clock)
                evaluating = run.eval_every > 0 and step % run.eval_every == 0 and step < total
                saving = self.keeper.planned(step) or stopping or step == total
                if evaluating or saving:
                    watch.flush()  # what is not finite is neither evaluated nor saved
                    with self.clock:
                        if evaluating:
                            self._evaluate(step, state)
                        if saving:
                            self._save(state)
                if stopping and step < total:
                    return state, True
        return state, False

    def save_last(self, state: TrainState) -> bool:
        """Saves before the last evaluation: a run killed during that only evaluates when run again.

        Returns whether to go on: False where a signal came meanwhile.
        """
        with self.stop:
            self._save(state)
            self.checkpoints.wait()
        return not self.stop.asked

    def finish(self, state: TrainState) -> dict[str, Value]:
        """The last evaluation, unless an earlier session made it."""
        step = int(state.step)
        final = self.report.evaluated(step) if self.finished_before else None
        if final is None:
            final = self._evaluate(step, state)
        else:
            self.log(f"nothing to do: the run in {self.workdir} finished at step {step}")
        check_finite(final)
        return final

    def _evaluate(self, step: int, state: TrainState) -> dict[str, Value]:
        metrics = measure(self.run, state.variables, state.ema)
        self.report.evaluation(step, metrics)
        average_warning(self.run, step, self.log)
        self.keeper.note(step, metrics)
        return metrics

    def _save(self, state: TrainState) -> None:
        hosts.agree(self.lock.check)
        self.report.flush()
        facts = {"config": self.run.settings.plain, "run": identity.describe(self.run)}
        meta = {**facts, **self.rewinds.meta, **self.keeper.meta, **self.watch.meta}
        self.checkpoints.save(state, seconds=self.clock.seconds, **meta)

    def _go_back(self, bad: NotFiniteError) -> TrainState:
        """The state of the last planned checkpoint, or of the beginning."""
        self.rewinds.check(bad, self.checkpoints.newest)
        self.checkpoints.wait()
        found = self.checkpoints.restore(self.run.abstract_state, among=self.keeper.planned)
        state = beginning(self.run, self.log).state if found is None else found.state
        meta = {} if found is None else found.meta
        step = int(state.step)
        self.checkpoints.forget(step)
        self.log(self.rewinds.add(step, bad))
        self._take_up(step, meta)
        return state
