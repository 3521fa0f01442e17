"""The compiled step of a run: its memory, and a run that goes no further."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from dyntoken.train.build import Run, build
from dyntoken.train.logging import duration

Log = Callable[[str], None]


def dry_run(config: Mapping[str, Any], *, log: Log = print) -> dict[str, Any]:
    """Builds and compiles a run without weights or images.

    Returns:
      `model`, `parameters`, `teacher`, `devices`, `batch`, `steps_per_epoch`,
      `steps`, `eval_every`, `compile_s`, and per device in bytes `state_bytes`
      and `memory_bytes` (arguments, results and temporaries of the step).
    """
    run = build(config)
    began = time.monotonic()
    largest = run.stages[0].model  # a keep rate only falls
    memory = run.train_step_for(largest).memory_analysis()
    parameters = sum(x.size for x in jax.tree.leaves(run.abstract_state.params))
    facts = {
        "model": run.settings.model["name"],
        "parameters": parameters,
        "teacher": (run.settings.teacher or {}).get("name") or None,
        "devices": f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}",
        "batch": run.settings.batch,
        "steps_per_epoch": run.steps_per_epoch,
        "steps": run.total_steps,
        "eval_every": run.eval_every,
        "compile_s": round(time.monotonic() - began, 1),
        "state_bytes": held_bytes(run),
        "memory_bytes": peak(memory),
    }
    for name, value in facts.items():
        log(f"{name}: {value}")
    return facts


class Programs:
    """The train step of each stage of a run, compiled when it is reached.

    Args:
      run: the run.
      log: takes one line of text; hears of all stages at once.
    """

    def __init__(self, run: Run, log: Log):
        self._run, self._log = run, log
        self._firsts = [stage.first for stage in run.stages]
        self._stage, self._compiled = -1, None
        if len(run.stages) > 1:
            parts = (f"{'/'.join(map(str, stage.counts))} from step {stage.first}" for stage in run.stages)
            log(f"tokens kept in {len(run.stages)} stages, a compilation each: {', '.join(parts)}")

    def ready(self, done: int) -> bool:
        """Whether `at` costs nothing."""
        return self._stage == bisect.bisect_right(self._firsts, done) - 1

    def at(self, done: int) -> jax.stages.Compiled:
        """The step that follows `done` steps."""
        if not self.ready(done):
            self._stage = bisect.bisect_right(self._firsts, done) - 1
            self._compiled = compile_step(self._run, self._run.stages[self._stage].model, self._log)
        return self._compiled


def compile_step(run: Run, model: nn.Module, log: Log) -> jax.stages.Compiled:
    """A train step, and a line about it."""
    log(
        f"compiling the training step for {spell_devices(run.mesh)}: seconds for a small model, minutes for others"
    )
    began = time.monotonic()
    compiled = run.train_step_for(model)
    memory = peak(compiled.memory_analysis()) / 2**20
    log(
        f"compiled in {duration(time.monotonic() - began)}: {run.total_steps} steps of "
        f"{run.settings.batch} images, {memory:.0f} MiB a device"
    )
    return compiled


def spell_devices(mesh: Mesh) -> str:
    """What a run computes on; a CPU's cores are one device or several (`main.use_all_cores`)."""
    first, count = mesh.devices.flat[0], mesh.size
    if first.platform != "cpu":
        return f"{count} x {first.device_kind}"
    return "the CPU" if count == 1 else f"{count} devices, which are the cores of the CPU"


def peak(memory: Any) -> int:
    """Bytes per device while a step runs; donated arguments count once."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def state_bytes(run: Run) -> int:
    """What one checkpoint holds."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.abstract_state))


def held_bytes(run: Run) -> int:
    """What each device holds of the state between two steps."""
    leaves = jax.tree.leaves(run.abstract_state)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
