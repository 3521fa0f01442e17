"""The training loop, callable from a notebook: `run(config, workdir)`.

Rerunning the same command goes on where the run stopped. A run starts from the
first of these that is given: its own workdir, `config.resume` (another run),
`config.init` (weights), fresh variables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from dyntoken import data, weights
from dyntoken.eval.classify import classify
from dyntoken.train import hosts
from dyntoken.train import mesh as meshes
from dyntoken.train.checkpoint import Checkpoints, Restored, folder, restore_from
from dyntoken.train.plan import Plan, build
from dyntoken.train.report import Clock, Report, Value, atomic_write, duration, spell
from dyntoken.train.state import TrainError, TrainState

Tree = Any
Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
      state: after the last step.
      metrics: of the final evaluation (`top1`, ... and `ema/top1`, ...; lists
        where there is a value per exit); empty if the run was stopped before
        its end.
      model: the module; `model.apply(result.state.variables, images)`.
      plan: what was run.
      workdir: folder of the run.
      finished: False if a signal stopped it; rerun to go on.
    """

    state: TrainState
    metrics: dict[str, Value]
    model: nn.Module
    plan: Plan
    workdir: epath.Path
    finished: bool


def run(config: Mapping[str, Any], workdir: str | epath.PathLike, *, log: Log = print) -> Result:
    """Trains, evaluates and checkpoints; resumes by itself.

    Args:
      config: see `plan.Settings`.
      workdir: folder of the run, made if absent; may be on `gs://`.
      log: takes one line of text.

    Raises:
      TrainError: when the loss or the gradient stops being finite.
      ValueError: for what does not fit together, before anything is written.
      CheckpointError: when the workdir holds another run, or only damaged files.
      WorkdirError: when nothing, or no checkpoint, can be written to the workdir.
      HostError: when the processes differ in data, config, weights or workdir.
    """
    log = log if jax.process_index() == 0 else _silent
    plan = hosts.agree(lambda: build(config), _facts)
    settings, total = plan.settings, plan.total_steps
    workdir = epath.Path(workdir).expanduser().absolute()
    hosts.check_workdir(workdir, need=_state_bytes(plan))
    report = Report(workdir, total=total, batch=settings.batch, log=log)
    with (
        contextlib.closing(Checkpoints(workdir, keep=settings.keep_checkpoints, log=log)) as checkpoints,
        _Stop() as stop,
    ):
        state, clock, same = _start(plan, checkpoints, log)
        first = step = int(state.step)
        report.resume(first)
        _write_config(workdir, plan)
        if first < total:
            # Both: a wrong evaluation split must not show up after the training.
            batches, _ = hosts.agree(lambda: (plan.train_batches(first), plan.eval_batches()))
            teacher = _load_teacher(plan, log)
            train_step = _compile(plan, log)
            watch = _Watch()
            clock.start(first)
            with data.prefetch(batches) as batches:
                for step, batch in zip(range(first + 1, total + 1), batches, strict=False):
                    state, metrics = train_step(state, teacher, meshes.place(batch, plan.mesh))
                    watch.add(step, metrics)
                    stopping = stop.asked or checkpoints.preempted(step)
                    if step % settings.log_steps == 0 or step == total:
                        report.train(step, watch.means(), lr=float(plan.lr_fn(step - 1)), clock=clock)
                    if _due(step, plan.eval_every) and step < total:
                        with clock:
                            report.evaluation(step, measure(plan, state.variables, state.ema))
                    if _due(step, settings.checkpoint_steps) or stopping or step == total:
                        watch.flush()  # what is not finite is never saved
                        with clock:
                            checkpoints.save(state, seconds=clock.seconds, config=settings.plain)
                    if stopping and step < total:
                        log(f"stopped by a signal after step {step}: run the same command again to go on")
                        return Result(state, {}, plan.model, plan, workdir, finished=False)
        # Saved before the last evaluation: a run killed during it only evaluates when run again.
        checkpoints.save(state, seconds=clock.seconds, config=settings.plain)
        checkpoints.wait()
        final = report.evaluated(step) if same and first >= total else None
        if final is None:
            final = measure(plan, state.variables, state.ema)
            report.evaluation(step, final)
        else:
            log(f"nothing to do: the run in {workdir} finished at step {step}")
    return Result(state, final, plan.model, plan, workdir, finished=True)


def evaluate(
    config: Mapping[str, Any], workdir: str | epath.PathLike | None = None, *, log: Log = print
) -> dict[str, Value]:
    """Evaluates the newest checkpoint of a workdir, else the weights of `config.init`.

    Returns:
      `top1`, `top5` (fractions), `loss`, `count`, `images_per_s`, of a model
      with exits `top1_per_exit` (the others are those of the last exit), the
      same with the prefix `ema/` where the run keeps an average, and the `step`
      of a checkpoint.

    Raises:
      ValueError: if there is neither a checkpoint nor `config.init.path`.
    """
    log = log if jax.process_index() == 0 else _silent
    plan = hosts.agree(lambda: build(config), _facts)
    if workdir is not None and _has_checkpoints(workdir):
        found = restore_from(workdir, plan.abstract_state, log=log)
        log(f"evaluating step {found.step} of {workdir}")
        variables, ema, extra = found.state.variables, found.state.ema, {"step": found.step}
    elif (plan.settings.init or {}).get("path"):
        variables, ema, extra = _load_init(plan, log), None, {}
    else:
        raise ValueError(
            f"nothing to evaluate: no checkpoint in {workdir} and config.init.path is empty; "
            "train first, or give --config.init.path=WEIGHTS"
        )
    variables = meshes.replicate(variables, plan.mesh)
    step = plan.eval_step  # compiled before the clock starts
    log(f"evaluating batches of {plan.eval_batch}, {_peak(step.memory_analysis()) / 2**20:.0f} MiB a device")
    began = time.monotonic()
    metrics = measure(plan, variables, ema)
    passes = 1 if ema is None else 2
    metrics["images_per_s"] = passes * metrics["count"] / (time.monotonic() - began)
    return metrics | extra


def dry_run(config: Mapping[str, Any], *, log: Log = print) -> dict[str, Any]:
    """Builds and compiles a run without weights or images.

    Returns:
      `model`, `parameters`, `teacher`, `devices`, `batch`, `steps_per_epoch`,
      `steps`, `eval_every`, `compile_s`, and per device in bytes `state_bytes`
      and `memory_bytes` (arguments, results and temporaries of the step).
    """
    plan = build(config)
    began = time.monotonic()
    memory = plan.train_step.memory_analysis()
    parameters = sum(x.size for x in jax.tree.leaves(plan.abstract_state.params))
    facts = {
        "model": plan.settings.model["name"],
        "parameters": parameters,
        "teacher": (plan.settings.teacher or {}).get("name") or None,
        "devices": f"{plan.mesh.size} x {plan.mesh.devices.flat[0].device_kind}",
        "batch": plan.settings.batch,
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": plan.total_steps,
        "eval_every": plan.eval_every,
        "compile_s": round(time.monotonic() - began, 1),
        "state_bytes": _state_bytes(plan),
        "memory_bytes": _peak(memory),
    }
    for name, value in facts.items():
        log(f"{name}: {value}")
    return facts


def _state_bytes(plan: Plan) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(plan.abstract_state))


def _facts(plan: Plan) -> dict[str, Any]:
    """What has to be the same on every host; where the data lie may differ."""
    facts = {f"config.{name}": value for name, value in _flat(plan.settings.plain).items()}
    facts.pop("config.data.data_dir", None)
    info = plan.info
    facts |= {f"the size of split {name!r}": size for name, size in info.splits.items()}
    names = zlib.crc32("\n".join(info.class_names).encode())
    return facts | {"the number of classes": info.num_classes, "the checksum of the class names": names}


def _write_config(workdir: epath.Path, plan: Plan) -> None:
    if jax.process_index() == 0:
        atomic_write(workdir / "config.json", json.dumps(plan.settings.plain, indent=2) + "\n")


def _start(plan: Plan, checkpoints: Checkpoints, log: Log) -> tuple[TrainState, Clock, bool]:
    """The state to go on from, its clock, and whether this very config made it."""
    settings = plan.settings
    found = checkpoints.restore(plan.abstract_state)
    if found is not None:
        log(f"resuming at step {found.step} of {plan.total_steps}")
    elif settings.resume:
        found = restore_from(settings.resume, plan.abstract_state, log=log)
        log(f"going on from step {found.step} of {settings.resume}")
    if found is not None:
        same = _compare(found, settings.plain, log)
        return found.state, Clock(found.meta["seconds"]), same
    variables = _load_init(plan, log) if (settings.init or {}).get("path") else None
    return plan.new_state(variables), Clock(), True


def _compare(found: Restored, config: Mapping[str, Any], log: Log) -> bool:
    before, now = _flat(found.meta["config"]), _flat(config)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        shown = ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in changed[:6])
        log(f"the config differs from the checkpoint's: {shown}" + (", ..." if len(changed) > 6 else ""))
    return not changed


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for key, node in tree.items() for k, v in _flat(node, f"{prefix}.{key}".strip(".")).items()}


def _load_init(plan: Plan, log: Log) -> Tree:
    options = dict(plan.settings.init)
    path = options.pop("path")
    variables, report = hosts.agree(
        lambda: weights.load_weights(plan.model, path, return_report=True, **options), _checksum
    )
    log(f"initial weights: {report}")
    return variables


def _load_teacher(plan: Plan, log: Log) -> Tree:
    if plan.teacher is None:
        return {}
    path = plan.settings.teacher["weights"]
    variables, report = hosts.agree(
        lambda: weights.load_weights(plan.teacher, path, return_report=True), _checksum
    )
    log(f"teacher: {report}")
    return meshes.replicate(variables, plan.mesh)


def _checksum(loaded: tuple[Tree, Any]) -> dict[str, Any]:
    return {"the checksum of the weights": hosts.digest(loaded[0])}


def _compile(plan: Plan, log: Log) -> jax.stages.Compiled:
    began = time.monotonic()
    compiled = plan.train_step
    memory = _peak(compiled.memory_analysis()) / 2**20
    log(
        f"compiled in {duration(time.monotonic() - began)}: {plan.total_steps} steps of "
        f"{plan.settings.batch} images on {plan.mesh.size} device(s), {memory:.0f} MiB each"
    )
    return compiled


def _peak(memory: Any) -> int:
    """Bytes per device while a step runs; donated arguments count once."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def measure(plan: Plan, variables: Tree, ema: Tree | None = None) -> dict[str, Value]:
    """Evaluates variables on the plan's evaluation split: `top1`, ..., and `ema/top1`, ... ."""
    metrics = classify(plan.eval_step, variables, _placed(plan))
    if ema is not None:
        averaged = classify(plan.eval_step, ema, _placed(plan))
        metrics |= {f"ema/{name}": value for name, value in averaged.items() if name != "count"}
    return metrics


def _placed(plan: Plan) -> Iterator[dict[str, jax.Array]]:
    with data.prefetch(plan.eval_batches()) as batches:
        for batch in batches:
            yield meshes.place(batch, plan.mesh)


def _silent(line: str) -> None:
    """What the other processes say."""


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _has_checkpoints(workdir: str | epath.PathLike) -> bool:
    where = folder(workdir)
    return where.exists() and any(entry.name.isdigit() for entry in where.iterdir())


class _Watch:
    """Collects metrics one step behind the device and stops at what is not finite."""

    def __init__(self) -> None:
        self._waiting: tuple[int, Mapping[str, Any]] | None = None
        self._sums: dict[str, tuple[np.ndarray, float]] = {}

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step that may still run; looks at those before."""
        for value in jax.tree.leaves(metrics):
            value.copy_to_host_async()
        previous, self._waiting = self._waiting, (step, metrics)
        if previous is not None:
            self._look(*previous)

    def flush(self) -> None:
        """Looks at the newest step, too."""
        if self._waiting is not None:
            self._look(*self._waiting)
            self._waiting = None

    def means(self) -> dict[str, Value]:
        """Sum over count of each metric since the last call."""
        self.flush()
        means = {name: _mean(total, count) for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def _look(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {
            name: (np.asarray(total, np.float64), float(count)) for name, (total, count) in metrics.items()
        }
        if not all(np.isfinite(total).all() for total, _ in values.values()):
            told = ", ".join(f"{name} {spell(_mean(*pair), '.6g')}" for name, pair in values.items())
            raise TrainError(
                f"not finite at step {step}: {told}; nothing after step {step - 1} was saved. "
                "Lower optim.lr, set optim.clip or lengthen the warm-up, then run again"
            )
        for name, (total, count) in values.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + total, before[1] + count)


def _mean(total: np.ndarray, count: float) -> Value:
    return (total / max(count, 1e-30)).tolist()


class _Stop:
    """Turns SIGTERM into a question the loop asks between steps.

    Several processes are asked through the cluster's notice instead
    (`Checkpoints.preempted`), so that all of them stop at the same step.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._active = threading.current_thread() is threading.main_thread() and jax.process_count() == 1

    def __enter__(self) -> _Stop:
        if self._active:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
