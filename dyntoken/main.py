"""Trains, evaluates or plans a run.

    python -m dyntoken.main --config=configs/tps_deit.py:demo --workdir=runs/demo
    python -m dyntoken.main --config=configs/tps_deit.py --config.optim.lr=5e-4 --dry_run
    python -m dyntoken.main --config=configs/tps_deit.py:demo --workdir=runs/demo --mode=eval --step=best
    python -m dyntoken.main --mode=eval --workdir=runs/demo

Rerunning a command resumes it. The evaluation of a run needs no --config: the run keeps its own. An
evaluation also writes predictions, accuracy by class and a confusion matrix into WORKDIR/eval, or where
--out says. What follows the colon are arguments of the recipe, which its head describes.
`--config.KEY=VALUE` sets any key of the config, whether the recipe names it or not: numbers, True,
None, text, sequences as 3-6-9 or 3,6,9 or (3, 6, 9), sizes as 224x320.
The keys: configs/common.py has them with their defaults, dyntoken/train/settings.py says what
they mean, and `--config=FILE[:arguments] --help` lists those of a recipe.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys

from absl import app, flags, logging
from ml_collections import config_dict

from dyntoken import compilation_cache, multihost, paths, peers, schema, workdirs
from dyntoken import config as recipes

FLAGS = flags.FLAGS
USER_ERRORS = (ValueError, OSError, ImportError, RuntimeError)
CORES_FLAG = "--xla_force_host_platform_device_count"


class Recipe(flags.ArgumentParser):
    """Reads `--config=FILE[:arguments]` as the config that the recipe makes; `path` stays."""

    path = ""

    def parse(self, argument: str):
        self.path = argument
        return recipes.load(argument)


RECIPE = Recipe()
flags.DEFINE(RECIPE, "config", None, "FILE[:arguments], the recipe; --config.KEY=VALUE sets a key of it")
flags.DEFINE_string("workdir", None, "folder of the run, also gs://; by default runs/<config>")
flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval"],
    "train, or evaluate the run in --workdir, without --config as its own config says; without --workdir, "
    "whole weights given by --config.init.path",
)
flags.DEFINE_string(
    "out",
    None,
    "of --mode=eval: folder for predictions, accuracy by class and confusion matrix; by default WORKDIR/eval, "
    "without --workdir none",
)
flags.DEFINE_string("step", "newest", "of --mode=eval: newest, best (by the run's best_metric) or a number")
flags.DEFINE_bool("restart", False, "start anew; what is in the workdir is moved to WORKDIR/old/N")
flags.DEFINE_bool("dry_run", False, "build, compile, print parameters, MACs, memory and plan; read no data")
flags.DEFINE_string("compilation_cache", "", compilation_cache.HELP)
flags.DEFINE_enum(
    "distributed", "auto", multihost.MODES, "join other processes (auto: if the environment says so)"
)
flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, on a cluster without Slurm, Open MPI or TPUs"
)
flags.DEFINE_integer("processes", None, "number of processes", lower_bound=1)
flags.DEFINE_integer("process", None, "which of the processes this is, from 0", lower_bound=0)
flags.DEFINE_float("cluster_timeout", 300.0, "seconds to wait for the other processes", lower_bound=1.0)
flags.DEFINE_float(
    "lost_after", 30.0, "seconds without a sign of life after which a process is lost", lower_bound=1.0
)


def use_all_cores(batch: int) -> None:
    """Lets a CPU run as several devices, which XLA keeps busier than one.

    Does nothing to a GPU or TPU, nor where XLA_FLAGS already says how many. The
    result does not depend on the number of devices but for rounding.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = max(n for n in (1, 2, 4, 8) if n == 1 or (n <= cores and batch % (2 * n) == 0))
    if CORES_FLAG not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {CORES_FLAG}={devices}".strip()


def start(config, what: str) -> None:
    """Says what is about to be done, and joins the other processes, if there are any.

    Must come before jax is used.
    """
    logging.set_verbosity(logging.WARNING)  # jax and Orbax narrate what they do
    logging.get_absl_logger().addFilter(lambda record: "preemption sync point" not in record.getMessage())
    cluster = multihost.detect(
        FLAGS.distributed, coordinator=FLAGS.coordinator, processes=FLAGS.processes, process=FLAGS.process
    )
    if not cluster.process:
        print(f"{what}; starting takes some seconds", flush=True)
    compilation_cache.use(FLAGS.compilation_cache)
    use_all_cores(config.batch // (cluster.processes or 1))
    try:
        multihost.initialize(cluster, timeout=FLAGS.cluster_timeout, lost_after=FLAGS.lost_after)
    except multihost.HostError as error:
        fail(error, at_once=True)


def run(
    config,
    workdir: str | None,
    mode: str,
    dry_run: bool,
    step: str = "newest",
    *,
    restart: bool = False,
    out: str | None = None,
) -> int:
    """Does what the flags ask for; returns the exit status; raises what goes wrong."""
    from dyntoken import train

    say = multihost.only_first(print)
    config = config.to_dict()
    if restart and (dry_run or mode == "eval"):
        raise ValueError("--restart starts a training run anew: leave it out of --mode=eval and --dry_run")
    if out and (dry_run or mode != "eval"):
        raise ValueError("--out is for --mode=eval: a training run writes into --workdir")
    if dry_run:
        facts = train.dry_run(config, log=say)
        gmacs = _gmacs(train.build(config).model)
        each = [f"{value:.4g}" for value in gmacs] if isinstance(gmacs, list) else []
        say(f"gmacs: {' / '.join(each)} up to each exit" if each else f"gmacs: {gmacs:.3f}")
        say(f"plan: {facts['steps']} steps of {config['batch']} images into {workdir}")
    elif mode == "eval":
        out = out or (None if workdir is None else os.path.join(workdir, "eval"))
        metrics = train.evaluate(config, workdir, step=step, out=out)
        gmacs = _gmacs(train.build(config, training=False).model)
        say(json.dumps({**metrics, "count": int(metrics["count"]), "gmacs": gmacs}))
    else:
        result = train.run(config, workdir, restart=restart)
        if not result.finished:
            return 128 + result.signum
        if config.get("compare"):
            from dyntoken.tools import demo_report

            demo_report.report(config, result, log=say)
    return 0


def _gmacs(model) -> float | list[float]:
    """Multiply-adds (1e9) of one image, of a model with exits up to each of them."""
    from dyntoken.analysis import macs

    found = macs.gmacs(model)
    return [round(value, 6) for value in found] if isinstance(found, list) else round(found, 6)


def main(argv: list[str]) -> int:
    """Entry point under `absl.app`; returns the exit status."""
    if argv[1:]:
        fail(f"unexpected argument {argv[1]!r}: options are written --name=value")
    default = os.path.join("runs", re.sub(r"\W+", "_", os.path.basename(RECIPE.path).replace(".py", "")))
    try:
        workdir = FLAGS.workdir or default
        names_weights = any(word.partition("=")[0].lstrip("-") == "config.init.path" for word in sys.argv[1:])
        if FLAGS.mode == "eval" and FLAGS.workdir is None and names_weights:
            workdir = None  # these weights, not the run that may lie in the default folder
        start(FLAGS.config, describe(FLAGS.config, workdir))
        return run(
            FLAGS.config, workdir, FLAGS.mode, FLAGS.dry_run, FLAGS.step, restart=FLAGS.restart, out=FLAGS.out
        )
    except USER_ERRORS as error:
        peers.blame(error)
        fail(error)


def describe(config, workdir: str | None) -> str:
    """What a command is about to do, in words that need no jax."""
    name, source = config.model.name, config.data.name
    if FLAGS.mode == "eval":
        return f"evaluating {name} on {source}, {workdir or config.init.path}"
    length = f"{config.steps} steps" if config.get("steps", 0) > 0 else f"{config.epochs:g} epochs"
    doing = "planning" if FLAGS.dry_run else "training"
    begun = os.path.join(workdir, "checkpoints")
    if doing == "training" and not FLAGS.restart and os.path.isdir(begun) and os.listdir(begun):
        return (
            f"opening {workdir}, which holds a run: {name} on {source}, {length}, batches of {config.batch}"
        )
    return f"{doing} {name} on {source}: {length}, batches of {config.batch}, into {workdir}"


def fail(error: object, *, at_once: bool = False) -> None:
    """One line on stderr, exit status 1; `at_once` without jax's farewell to the others."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if at_once:
        os._exit(1)
    sys.exit(1)


def split_changes(argv: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Takes `--config.KEY=VALUE` (or `--config.KEY VALUE`; VALUE is True if left out) out of the arguments."""
    changes, rest, words = [], [], list(argv)
    while words:
        name, given, value = words.pop(0).partition("=")
        key = re.fullmatch(r"--?config\.(.+)", name)
        if key is None:
            rest.append(name + given + value)
            continue
        if not given:
            value = words.pop(0) if words and not words[0].startswith("--") else "True"
        changes.append((key[1], value))
    return changes, rest


def parse(argv: list[str], changes: list[tuple[str, str]]) -> list[str]:
    """Reads the flags and sets the keys; returns what is neither. What is wrong ends in one line."""
    try:
        rest = FLAGS(argv)
        if FLAGS.config is None:
            FLAGS.config = stored_config(FLAGS.workdir) if FLAGS.mode == "eval" and FLAGS.workdir else None
        if FLAGS.config is None:
            more = ", or the --workdir of a run" if FLAGS.mode == "eval" else ""
            raise ValueError(
                f"which recipe? give --config=FILE[:args]{more}, for instance --config=configs/tps_deit.py:demo"
            )
        from dyntoken.train import settings

        settings.override(FLAGS.config, changes)
        return rest
    except flags.UnrecognizedFlagError as error:
        close = schema.nearest(error.flagname, [*FLAGS, *(key for key, _ in keys(FLAGS["config"].value))])
        hint = f"did you mean --{', --'.join(close)}?" if close else "--help lists them"
        fail(f"unknown option --{error.flagname}: {hint}")
    except (flags.Error, *USER_ERRORS) as error:
        fail(error)


def stored_config(workdir: str) -> config_dict.ConfigDict:
    """The config that a run was trained with: an evaluation needs no recipe."""
    path = paths.resolve(workdir) / workdirs.CONFIG
    if not path.exists():
        raise ValueError(
            f"no run in {workdir} (it has no {workdirs.CONFIG}): give the --workdir of a run, or "
            "--config=FILE[:args]"
        )
    try:
        return config_dict.ConfigDict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): give --config=FILE[:args]") from error


def keys(config) -> list[tuple[str, str]]:
    """Full name of every key that a config may have, and what it may be."""
    from dyntoken.train import settings

    config = {} if config is None else config.to_dict()
    try:
        settings.plugins(config)
        found = list(schema.leaves(settings.Settings, config, "config"))
    except USER_ERRORS as error:
        fail(error)
    return [(key, schema.describe(kind)) for key, kind in found]


def usage(argv: list[str]) -> None:
    """Prints what the program takes; with `--config` also the recipe's arguments and keys."""
    print(f"{__doc__.strip()}\n\nflags:{FLAGS.module_help(FLAGS.find_module_defining_flag('workdir'))}")
    path = next((word.partition("=")[2] for word in argv if word.startswith("--config=")), "")
    if path:
        try:
            config = recipes.load(path)
        except USER_ERRORS as error:
            fail(error)
        print(f"\n{path} takes {recipes.arguments(path)}\n\nkeys:")
        print("\n".join(f"  --{key}: {what}" for key, what in keys(config)))


def cli() -> None:
    """The program."""
    changes, argv = split_changes(sys.argv)
    if any(word.lstrip("-") in ("help", "h", "helpfull", "helpshort") for word in argv[1:]):
        usage(argv)
        return
    app.run(main, argv=argv, flags_parser=functools.partial(parse, changes=changes))


if __name__ == "__main__":
    cli()
