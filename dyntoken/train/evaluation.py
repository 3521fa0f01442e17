"""Evaluates a run: every set, raw weights and their average."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from dyntoken import data, schedules
from dyntoken.eval.logits import classify
from dyntoken.train import hosts, identity
from dyntoken.train import mesh as meshes
from dyntoken.train.checkpoint import folder, restore_from
from dyntoken.train.compiled import peak, spell_devices
from dyntoken.train.evalsets import MAIN
from dyntoken.train.plan import Plan, build
from dyntoken.train.report import Value, silent
from dyntoken.train.start import facts, load_init
from dyntoken.weights.whole import load_whole

Tree = Any
Log = Callable[[str], None]


def evaluate(
    config: Mapping[str, Any],
    workdir: str | epath.PathLike | None = None,
    *,
    step: int | str = "newest",
    log: Log = print,
) -> dict[str, Value]:
    """Evaluates a checkpoint of a workdir or, without a workdir, the weights of `config.init`.

    Args:
      config: of the run; other `evals` than it had are fine.
      workdir: of the run; None evaluates the weights that `config.init` names,
        which must hold every array of the model.
      step: "newest", "best" (by the run's `best_metric`) or the number of a step.
      log: takes one line of text.

    Returns:
      `top1`, `top5` (fractions), `loss`, `count`, `images_per_s`, of a model
      with exits `top1_per_exit` (the others are those of the last exit), the
      same with the prefix `ema/` where the run keeps an average, all of these
      with the prefix `LABEL/` of each of `config.evals`, and the `step` of a
      checkpoint.

    Raises:
      ValueError: if there is no run in the workdir; without one, if no weights
        are named, or a step is; if a metric is not finite.
      WeightsError: if the weights leave anything to be initialised.
      CheckpointError: no such step, or it is damaged.
    """
    log = log if jax.process_index() == 0 else silent
    plan = hosts.agree(lambda: build(config, training=False), facts)
    if workdir is not None:
        if not _has_checkpoints(workdir):
            raise ValueError(
                f"nothing to evaluate: no checkpoint in {workdir}; give the --workdir of a run, or give none "
                "and name weights that hold the whole model, --config.init.path=WEIGHTS"
            )
        identity.check(workdir, plan, step)
        found = restore_from(workdir, plan.abstract_state, step=step, log=log)
        log(f"evaluating step {found.step} of {workdir}")
        variables, ema, extra = found.state.variables, found.state.ema, {"step": found.step}
        average_warning(plan, found.step, log)
    elif not (plan.settings.init or {}).get("path"):
        raise ValueError(
            "nothing to evaluate: give the --workdir of a run, or weights by --config.init.path=WEIGHTS"
        )
    elif step != "newest":
        raise ValueError(f"--step={step} chooses among the checkpoints of a run: give its --workdir")
    else:
        variables, ema, extra = load_init(plan, log, load_whole), None, {}
        variables = meshes.replicate(variables, plan.mesh)
    hosts.agree(lambda: check_sets(plan))
    log(f"compiling the evaluation for {spell_devices(plan.mesh)}: seconds to a minute")
    for label in plan.eval_sets:
        compiled = plan.eval_step_for(label)  # before the clock starts
    memory = peak(compiled.memory_analysis()) / 2**20
    log(f"evaluating batches of {plan.eval_batch}, {memory:.0f} MiB a device")
    began = time.monotonic()
    metrics = measure(plan, variables, ema)
    check_finite(metrics)
    images = sum(value for name, value in metrics.items() if name.rsplit("/", 1)[-1] == "count")
    passes = 1 if ema is None else 2
    metrics["images_per_s"] = passes * images / (time.monotonic() - began)
    return metrics | extra


def measure(plan: Plan, variables: Tree, ema: Tree | None = None) -> dict[str, Value]:
    """Evaluates variables on every set of the plan: `top1`, ..., `ema/top1`, ..., `LABEL/top1`, ... ."""
    variables, ema = meshes.gathered((variables, ema))
    metrics = {}
    for label in plan.eval_sets:
        prefix = f"{label}/" if label else ""
        found = classify(plan.eval_step_for(label), variables, _placed(plan, label))
        metrics |= {f"{prefix}{name}": value for name, value in found.items()}
        if ema is not None:
            found = classify(plan.eval_step_for(label), ema, _placed(plan, label))
            metrics |= {f"{prefix}ema/{name}": value for name, value in found.items() if name != "count"}
    return metrics


def average_warning(plan: Plan, step: int, log: Log) -> None:
    """Says where the weight average is still mostly what the run started from."""
    settings = plan.settings
    warning = schedules.ema_warning(step, settings.ema, warmup=settings.ema_warmup)
    if warning:
        log(warning)


def check_finite(metrics: Mapping[str, Value | None]) -> None:
    """Raises ValueError for an evaluation that says nothing: weights or images hold NaN or infinities."""
    bad = [name for name, value in metrics.items() if not np.isfinite(np.array(value, float)).all()]
    if bad:
        raise ValueError(
            f"the evaluation is not finite ({', '.join(bad)}): the weights or the images hold NaN or overflow; "
            "take another --step or other weights, and look at the data"
        )


def check_sets(plan: Plan) -> None:
    """Opens every set: what is not on disk must show up before the training, not after it."""
    for label in plan.eval_sets:
        plan.eval_batches(label)


def _placed(plan: Plan, label: str = MAIN) -> Iterator[dict[str, jax.Array]]:
    with data.prefetch(plan.eval_batches(label)) as batches:
        for batch in batches:
            yield meshes.place(batch, plan.mesh)


def _has_checkpoints(workdir: str | epath.PathLike) -> bool:
    where = folder(workdir)
    return where.exists() and any(entry.name.isdigit() for entry in where.iterdir())
