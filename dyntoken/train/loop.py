"""The training loop, callable from a notebook: `run(config, workdir)`.

Rerunning the same command goes on where the run stopped. A run starts from the
first of these that is given: its own workdir, `config.resume` (another run),
`config.init` (weights), fresh variables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from etils import epath

from dyntoken import data, interrupt, paths, progress
from dyntoken.checkpoints import Checkpoints
from dyntoken.multihost import all_or_none, check_workdir, of_first, only_first
from dyntoken.train import sharding
from dyntoken.train.build import Run, build, peak_bytes
from dyntoken.train.evaluate import check_finite, check_sets, measure, warn_of_average
from dyntoken.train.lock import Lock
from dyntoken.train.logging import (
    Clock,
    MetricBuffer,
    NotFiniteError,
    Observer,
    Progress,
    Report,
    Retention,
    Value,
    duration,
)
from dyntoken.train.profiler import Profiler
from dyntoken.train.start import beginning, check_same_run, load_teacher, move_aside, start, write_config
from dyntoken.train.state import TrainState
from dyntoken.train.writers import TensorBoard, WeightsAndBiases

Log = Callable[[str], None]
OWED = "owes_evaluation"  # in a checkpoint: a stop came first; the run makes up for it when it goes on


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
      config: see `settings.Settings`.
      workdir: folder of the run, made if absent; may be on `gs://`.
      restart: start anew; what is in the workdir is moved to `<workdir>/old/N`.

    Raises:
      TrainError: when the loss or the gradient stops being finite, and
        `config.rewind` allows no (further) rewind.
      ValueError: for what does not fit together, before anything is written; for a last evaluation that is
        not finite.
      CheckpointError: when the workdir holds another run, or only damaged files.
      LockedError: when another run writes to the workdir.
      StorageError: when nothing, or no checkpoint, can be written to the workdir, or a checkpoint cannot be read.
      HostError: when the processes differ in data, config, weights or workdir.
      ImportError: when `config.tensorboard` or `config.wandb` lacks its library.
    """
    log = only_first(log)
    log(f"devices: {sharding.describe_devices(jax.devices())}")
    made = all_or_none(lambda: build(config), lambda made: made.facts)
    log(made.summary)
    if made.warning:
        log(made.warning)
    return train(made, workdir, restart=restart, log=log)


def train(run: Run, workdir: str | epath.PathLike, *, restart: bool = False, log: Log = print) -> Result:
    """What `run` does with a config that was built."""
    log, settings, total = progress.beside(only_first(log)), run.settings, run.total_steps
    workdir = all_or_none(lambda: paths.resolve(workdir))
    check_workdir(workdir, need=run.state_bytes)
    with contextlib.ExitStack() as stack:
        # One run at a time in a workdir; process 0 holds the lock for all.
        lock = Lock(workdir, log)
        all_or_none(lambda: stack.enter_context(lock) if jax.process_index() == 0 else None)
        if restart:
            all_or_none(lambda: move_aside(workdir, log))

        # What watches the run.
        clock = Clock()
        metrics = MetricBuffer(
            clock, every=settings.log_steps, total=total, batch=settings.batch, lr_fn=run.lr_fn
        )
        report = Report(workdir, total=total, metrics=metrics, curves=settings.curves, log=log)
        retention = Retention(
            workdir,
            metric=settings.best_metric,
            best=settings.keep_best,
            rewind=settings.rewind > 0,
            periods=[settings.checkpoint_steps] + [run.eval_every] * (settings.keep_best > 0),
        )
        observers: list[Observer] = [metrics, report, retention]
        if jax.process_index() == 0:
            observers.append(Progress(total, metrics))
        observers += all_or_none(
            lambda: writers_of(run, workdir, metrics) if jax.process_index() == 0 else []
        )
        if settings.profile is not None and jax.process_index() == 0:
            observers.append(Profiler(settings.profile, workdir, total=total, log=log))
        for observer in observers:
            stack.callback(observer.close)

        # Restore.
        checkpoints = Checkpoints(workdir, keep=settings.keep_checkpoints, also=retention.choose, log=log)
        stack.callback(checkpoints.close)
        check_same_run(workdir, run)
        begun = start(run, checkpoints, log)
        state, rewinds, step = begun.state, begun.rewinds, int(begun.state.step)
        evaluated = begun.same and step >= total  # perhaps, by an earlier session
        owed = begun.meta.get(OWED, False) and step < total
        clock.add(begun.seconds)
        for observer in observers:
            observer.resume(step, begun.meta)
        del begun  # the first step consumes its state
        write_config(workdir, run)

        def save(state: TrainState, **more: Any) -> None:
            all_or_none(lock.check)
            report.flush()  # the record must be there before the checkpoint is
            meta = {"config": settings.plain, "run": run.description, "seconds": clock.seconds} | more
            for one in (rewinds, *observers):
                meta |= one.meta
            checkpoints.save(int(state.step), state, **meta)

        def evaluate(state: TrainState, check: Callable[[], None] = lambda: None) -> dict[str, Value]:
            values = measure(run, state.variables, state.ema, None, check)
            for observer in observers:
                observer.eval(step, values)
            warn_of_average(run, step, log)
            return values

        # Loop.
        stop = interrupt.Stop(several=jax.process_count() > 1)
        # A notice names a step after those asked for: of a run that goes on that is one still to come.
        stopping = checkpoints.preempted(step) and step < total

        def try_evaluate(state: TrainState) -> bool:
            """False if a stop was asked for before it was done."""
            try:
                evaluate(state, stop.check)
            except interrupt.StopAskedError:
                return False
            return True

        if owed and not stopping and of_first(report.evaluated(step) is None):
            log(f"evaluating step {step}, where the run was stopped before it could")
            all_or_none(lambda: check_sets(run))
            with stop:
                stopping = not try_evaluate(state) or stop.asked
        if step < total and not stopping:
            # Both: a set that is missing must not show up after the training.
            batches, _ = all_or_none(lambda: (run.train_batches(step, **rewinds.data), check_sets(run)))
            teacher, programs = load_teacher(run, log), StepCache(run, clock, log)
        while step < total and not stopping:
            first, newest, train_step = step, None, programs.at(step)
            clock.start(step)
            for observer in observers:
                observer.start(step)
            try:
                with data.prefetch(batches) as batches, stop:
                    for step in range(first + 1, total + 1):
                        train_step = programs.at(step - 1)
                        batch = sharding.place(clock.take(batches, running=newest), run.mesh)
                        state, newest = train_step(state, teacher, batch)
                        stopping = (stop.asked or checkpoints.preempted(step)) and step < total
                        for observer in observers:
                            observer.step(step, newest)
                        due = run.eval_every > 0 and step % run.eval_every == 0 and step < total
                        if due or stopping or retention.planned(step) or step == total:
                            metrics.flush()
                            with clock:
                                owed = due and (stopping or not try_evaluate(state))
                                # Nor another step: several processes agree on it as they do after the next one.
                                if due and not stopping:
                                    stopping = owed or stop.asked or checkpoints.preempted(step + 1)
                                if stopping or retention.planned(step) or step == total:
                                    save(state, **({OWED: True} if owed else {}))
                        if stopping:
                            break
            except NotFiniteError as error:
                rewinds.check(error, checkpoints.newest)
                stopping = False  # after the next step, then
                bad = error.with_traceback(None)  # whose frames hold the state
                state = newest = batch = batches = None
                checkpoints.wait()
                found = checkpoints.restore(run.abstract_state, among=retention.planned)
                state = beginning(run, log).state if found is None else found.tree
                step = int(state.step)
                checkpoints.forget(step)
                log(rewinds.add(step, bad))
                for observer in observers:
                    observer.resume(step, {} if found is None else found.meta)
                found, batches = None, run.train_batches(step, **rewinds.data)

        # Finish. Saved before the last evaluation: a run killed during that only evaluates when run again.
        with stop:
            save(state)
            checkpoints.wait()
        if stopping or stop.asked:
            again = interrupt.go_on() or ": run the same command again to go on"
            log(f"stopped by a signal after step {step}, which is saved{again}")
            signum = stop.signum or signal.SIGTERM  # of several processes, to another one
            return Result(state, {}, run.model, run, workdir, finished=False, signum=signum)
        final = report.evaluated(step) if evaluated else None
        if final is None:
            final = evaluate(state)
        else:
            log(f"nothing to do: the run in {workdir} finished at step {step}")
        check_finite(final)
        return Result(state, final, run.model, run, workdir, finished=True)


def writers_of(run: Run, workdir: epath.Path, metrics: MetricBuffer) -> list[Observer]:
    """Where the config wants its metrics besides."""
    settings, found = run.settings, []
    if settings.tensorboard:
        found.append(TensorBoard(workdir, metrics))
    if settings.wandb:
        more = {"project": settings.wandb, "config": settings.plain}
        found.append(WeightsAndBiases(workdir, metrics, **more))
    return found


class StepCache:
    """The train step of each phase of a run, compiled when it is first reached.

    Args:
      clock: does not count compilations.
      log: takes one line of text; hears of all phases at once.
    """

    def __init__(self, run: Run, clock: Clock, log: Log):
        self._run, self._clock, self._log = run, clock, log
        self._compiled: dict[int, jax.stages.Compiled] = {}
        counts = ["/".join(map(str, phase.counts)) for phase in run.phases]
        if run.settings.elastic:
            log(f"tokens kept in turn, a compilation each: {', '.join(counts)}")
        elif len(run.phases) > 1:
            parts = (f"{n} from step {phase.first}" for n, phase in zip(counts, run.phases, strict=True))
            log(f"tokens kept in {len(run.phases)} stages, a compilation each: {', '.join(parts)}")

    def at(self, done: int) -> jax.stages.Compiled:
        """The step that follows `done` steps."""
        phase = self._run.phase_at(done)
        if phase not in self._compiled:
            if not self._run.settings.elastic:
                self._compiled.clear()  # no way back: a phase that is over frees its program
            with self._clock:
                self._compiled[phase] = self._compile(self._run.phases[phase].model)
        return self._compiled[phase]

    def _compile(self, model: nn.Module) -> jax.stages.Compiled:
        self._log("compiling the training step: seconds for a small model, minutes for others")
        began = time.monotonic()
        with progress.waiting("compiling the training step"):
            compiled = self._run.train_step_for(model)
        memory = peak_bytes(compiled.memory_analysis()) / 2**20
        self._log(
            f"compiled in {duration(time.monotonic() - began)}: {self._run.total_steps} steps of "
            f"{self._run.settings.batch} images, {memory:.0f} MiB a device"
        )
        return compiled
