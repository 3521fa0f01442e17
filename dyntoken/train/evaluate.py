"""A run, opened from its workdir, and its evaluation: every set, raw weights and their average."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from dyntoken import data, paths, progress, schedules
from dyntoken.checkpoints import Restored, restore_from
from dyntoken.data.splits import count_rows, parse_split
from dyntoken.eval.answers import Answers, collect
from dyntoken.eval.logits import classify
from dyntoken.multihost import all_or_none, only_first
from dyntoken.train import results, sharding
from dyntoken.train.build import Run, build, peak_bytes
from dyntoken.train.eval_datasets import MAIN
from dyntoken.train.logging import Value
from dyntoken.train.start import check_same_run, load_init
from dyntoken.weights import load_whole
from dyntoken.workdirs import CONFIG, FOLDER

Tree = Any
Log = Callable[[str], None]


def evaluate(
    config: Mapping[str, Any],
    workdir: str | epath.PathLike | None = None,
    *,
    step: int | str = "newest",
    out: str | epath.PathLike | None = None,
    log: Log = print,
) -> dict[str, Value]:
    """Evaluates a checkpoint of a workdir or, without a workdir, the weights of `config.init`.

    Args:
      config: of the run; other `evals` than it had are fine.
      workdir: of the run; None evaluates the weights that `config.init` names,
        which must hold every array of the model.
      step: "newest", "best" (by the run's `best_metric`) or the number of a step.
      out: folder for what is said of each image and class, see `train.results`; then there is also `ece`,
        the calibration error of the confidence (with exits `ece_per_exit`).

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
    log = progress.beside(only_first(log))
    log(f"devices: {sharding.describe_devices(jax.devices())}")
    run = all_or_none(lambda: build(config, training=False), lambda made: made.facts)
    log(run.summary)
    if workdir is not None:
        where = paths.resolve(workdir) / FOLDER
        if not (where.exists() and any(entry.name.isdigit() for entry in where.iterdir())):
            raise ValueError(
                f"nothing to evaluate: no checkpoint in {workdir}; give the --workdir of a run, or give none "
                "and name weights that hold the whole model, --config.init.path=WEIGHTS"
            )
        check_same_run(workdir, run, step)
        found = restore_weights(workdir, run, step, log)
        log(f"evaluating step {found.step} of {workdir}")
        variables, ema, extra = found.tree.variables, found.tree.ema, {"step": found.step}
        warn_of_average(run, found.step, log)
    elif not (run.settings.init or {}).get("path"):
        raise ValueError(
            "nothing to evaluate: give the --workdir of a run, or weights by --config.init.path=WEIGHTS"
        )
    elif step != "newest":
        raise ValueError(f"--step={step} chooses among the checkpoints of a run: give its --workdir")
    else:
        variables, ema, extra = load_init(run, log, load_whole), None, {}
        variables = sharding.replicate(variables, run.mesh)
    all_or_none(lambda: check_sets(run))
    log("compiling the evaluation: seconds to a minute")
    with progress.waiting("compiling the evaluation"):
        for label in run.eval_sets:
            compiled = run.eval_step_for(label, rows=out is not None)  # before the clock starts
    memory = peak_bytes(compiled.memory_analysis()) / 2**20
    log(f"evaluating batches of {run.eval_batch}, {memory:.0f} MiB a device")
    began = time.monotonic()
    found: dict[str, Answers] | None = None if out is None else {}
    metrics = measure(run, variables, ema, found)
    check_finite(metrics)
    images = sum(value for name, value in metrics.items() if name.rsplit("/", 1)[-1] == "count")
    passes = 1 if ema is None else 2
    metrics["images_per_s"] = passes * images / (time.monotonic() - began)
    if out is not None:
        results.write(out, run, found, log)
    return metrics | extra


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a workdir holds.

    Attributes:
      run: of its `config.json`.
      variables: of the newest intact checkpoint, on every device of `run.mesh`.
      step: of that checkpoint.
    """

    run: Run
    variables: Tree
    step: int

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """One pass over the evaluation split, as global arrays split over the mesh."""
        return _placed(self.run)


def open_workdir(
    workdir: str | epath.PathLike,
    *,
    split: str | None = None,
    ema: bool = False,
    log: Callable[[str], None] = print,
) -> Opened:
    """The run and the newest weights of a run, without its recipe.

    Args:
      split: what is read instead of the run's evaluation split, `"train[:5000]"`.
      ema: take the weight average.

    Raises:
      ValueError: no run there, no intact checkpoint, no such split, or no
        average in the checkpoint.
    """
    workdir = paths.resolve(workdir)
    path = workdir / CONFIG
    if not path.exists():
        raise ValueError(f"no run in {workdir} (it has no config.json): give the workdir of a training run")
    config = json.loads(path.read_text())
    if split is not None:
        config["data"]["eval_split"] = split
    run = build(config, training=False)
    if ema and run.settings.ema <= 0:
        raise ValueError(f"the run in {workdir} keeps no weight average: leave --ema out")
    check_same_run(workdir, run)
    found = restore_weights(workdir, run, "newest", log)
    return Opened(run, found.tree.ema if ema else found.tree.variables, found.step)


def restore_weights(workdir: str | epath.PathLike, run: Run, step: int | str, log: Log) -> Restored:
    """A checkpoint without the state of its optimizer, which an evaluation does not need."""
    like = run.abstract_state.replace(opt_state=None)
    return restore_from(workdir, like, step=step, log=log, leave_out="opt_state")


def measure(
    run: Run,
    variables: Tree,
    ema: Tree | None = None,
    answers: dict[str, Answers] | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Value]:
    """Evaluates variables on every set of the run: `top1`, ..., `ema/top1`, ..., `LABEL/top1`, ... .

    Args:
      answers: is given what is answered to each image of a set, by its label: of the average where there is one.
      check: called before each batch; what it raises ends the evaluation.
    """
    variables, ema = sharding.replicate_all((variables, ema))
    metrics = {}
    for label in run.eval_sets:
        prefix = f"{label}/" if label else ""
        found = _measure_one(run, label, variables, answers, check)
        metrics |= {f"{prefix}{name}": value for name, value in found.items()}
        if ema is not None:
            found = _measure_one(run, label, ema, answers, check)
            metrics |= {f"{prefix}ema/{name}": value for name, value in found.items() if name != "count"}
    return metrics


def _measure_one(
    run: Run, label: str, variables: Tree, answers: dict[str, Answers] | None, check: Callable[[], None]
) -> dict[str, Any]:
    if answers is None:
        return classify(run.eval_step_for(label), variables, _placed(run, label, check=check))
    names: list[np.ndarray] = []
    step = run.eval_step_for(label, rows=True)
    found, answers[label] = collect(step, variables, _placed(run, label, names, check), names)
    return found


def warn_of_average(run: Run, step: int, log: Log) -> None:
    """Says where the weight average is still mostly what the run started from."""
    settings = run.settings
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


def check_sets(run: Run) -> None:
    """Opens every set: what is not on disk must show up before the training, not after it."""
    for label in run.eval_sets:
        run.eval_batches(label)


def _placed(
    run: Run,
    label: str = MAIN,
    names: list[np.ndarray] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, jax.Array]]:
    """The batches of a pass on the devices; `names` is filled with those of their images."""
    one = run.eval_sets[label]
    images = count_rows(parse_split(one.info.name, one.arguments["split"], one.info.splits))
    steps, what = -(-images // run.eval_batch), f"evaluating {label}".strip()
    with data.prefetch(run.eval_batches(label, named=names is not None)) as batches:
        shown = progress.over(batches, what, steps, unit="batches") if jax.process_index() == 0 else batches
        for batch in shown:
            check()
            if "name" in batch:
                names.append(batch["name"])
                batch = {key: value for key, value in batch.items() if key != "name"}
            yield sharding.place(batch, run.mesh)
