"""A TPU's program without a TPU.

Compiles the evaluation or the training step ahead of time with libtpu (extra
[aot]) for chips that are not there, and reports what the compiler says: memory per
chip, collectives, sorts, gathers, copies, and its own cost estimate by class of
operations. Nothing is run, nothing is measured but the compilation.

A report is kept as JSON (--results) and printed from there while the request and
the versions stay the same. Compiling takes minutes; with --scan a dense model's takes 0.6 of that.

Without --config a model trains as in the DynamicViT and TPS recipes: AdamW, an
average of the weights, mixup and CutMix, the keep-ratio loss where the method
learns its decision; --teacher adds the dense model and both distillation losses.

examples:
  python -m dyntoken.tools.tpu deit_small_patch16_224
  python -m dyntoken.tools.tpu dtps_deit_small_patch16_224 --train --teacher --remat=True
  python -m dyntoken.tools.tpu --config=configs/dvt_deit.py --train --batch=64
  python -m dyntoken.tools.tpu evit_deit_base_patch16_384 --topology=v5p --json
  python -m dyntoken.tools.tpu --table results/tpu/*.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from dyntoken import __version__
from dyntoken.schema import Text
from dyntoken.tools import cli, tpu_report

# Before libtpu is loaded: it would ask a metadata server that is not there, and lock the chips.
# The last two only spare its complaints that this is no TPU host.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
# Short name: full topology; any other that libtpu knows may be given in full.
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x4",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x4",
    "pod": "v5e:16x16",
}
HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB per chip, from Google's data sheets


def arguments(parser: cli.Parser) -> None:
    """The options."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="model, e.g. dtps_deit_small_patch16_224")
    parser.add_argument("--config", help="recipe to take model, losses, teacher and optimizer from instead")
    cli.add_model_options(parser)
    group = parser.add_argument_group("the program")
    group.add_argument(
        "--topology",
        default="v5e:2x4",
        help=f"chips (default v5e:2x4): {', '.join(f'{k} = {v}' for k, v in TOPOLOGIES.items())}, or in full",
    )
    group.add_argument("--batch", type=cli.positive, default=128, help="images per chip (default 128)")
    group.add_argument("--train", action="store_true", help="the training step, optimizer and all")
    group.add_argument("--teacher", action="store_true", help="with --train: distill from the dense model")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="compute type (default bfloat16)"
    )
    group.add_argument("--scan", action="store_true", help="alike blocks as one loop")
    group.add_argument("--remat", type=Text, help="True, or what is kept, see the config")
    group.add_argument("--accumulate", type=cli.positive, help="slices of a batch, see the config")
    group.add_argument("--shard", help="none, optimizer or params, see the config")
    _report_options(parser.add_argument_group("the report"))
    parser.add_argument("--table", nargs="+", metavar="FILE", help="only print stored reports as a table")


def _report_options(group: Any) -> None:
    """What decides where a report goes, not what it says."""
    group.add_argument("--results", default="results/tpu", help="folder of the stored reports (results/tpu)")
    group.add_argument("--hlo", metavar="FILE", help="also write the compiled program as text (and compile)")
    group.add_argument("--again", action="store_true", help="compile even if there is a stored report")


def command(argv: Sequence[str]) -> str:
    """The command of a report, wherever it is written and however it is shown."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _report_options(parser)
    parser.add_argument("--json", action="store_true")
    return shlex.join(["python", "-m", __spec__.name, *parser.parse_known_args(argv)[1]])


def measure(args: argparse.Namespace) -> dict[str, Any] | list[dict[str, Any]]:
    """The report of one step, stored or new; with --table, stored ones."""
    if args.table:
        return [json.loads(pathlib.Path(path).read_text()) for path in args.table]
    run = make_run(args)
    wanted = request(args, run)
    path = pathlib.Path(args.results) / f"{slug(wanted)}.json"
    found = None if args.again or args.hlo else stored(path, wanted)
    if found is None:
        found = {"command": command(args.argv), **wanted, **compiled(args, run)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def report(found: dict[str, Any] | list[dict[str, Any]]) -> str:
    """A page of tables, or a line per report."""
    return tpu_report.table(found) if isinstance(found, list) else tpu_report.text(found)


def chips(topology: str) -> tuple[str, int, int]:
    """(full name, number of chips, GiB per chip) of a topology such as "v5e" or "v5e:2x4".

    Raises:
      ValueError: for a kind of chip or a shape that is none.
    """
    name = TOPOLOGIES.get(topology, topology)
    kind, _, shape = name.partition(":")
    sides = shape.split("x")
    if kind not in HBM or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(
            f"unknown topology {topology!r}: give {', '.join(TOPOLOGIES)}, or a kind "
            f"({', '.join(HBM)}) and a shape as in v5e:4x4"
        )
    return name, math.prod(map(int, sides)), HBM[kind]


def devices(topology: str) -> Sequence[Any]:
    """The chips that libtpu compiles for.

    Raises:
      ImportError: without libtpu.
      ValueError: for a topology that libtpu does not know.
    """
    name, _, _ = chips(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("libtpu is not installed, which compiles for TPUs: pip install libtpu")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # what runs here runs on the host
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed
    # One device per chip also where a chip has two cores, as jax runs them.
    options = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:
        raise ValueError(f"libtpu makes no topology {name!r}: {cli.one_line(error)[:200]}") from error


def make_run(args: argparse.Namespace) -> Any:
    """The run whose step is compiled; reads no images and no weights."""
    if (args.name is None) == (args.config is None):
        raise ValueError("give the NAME of a model, or --config=RECIPE")
    if args.teacher and (args.config or not args.train):
        raise ValueError("--teacher goes with NAME and --train; a recipe says itself who teaches")
    _, count, _ = chips(args.topology)
    from dyntoken import train

    given = {"dtype": args.dtype, "scan": args.scan, "remat": args.remat}
    given = {key: value for key, value in given.items() if value}
    config = _of_recipe(args, given) if args.config else _of_name(args, given)
    config["batch"] = args.batch * count
    config["data"].setdefault("eval", {}).pop("batch", None)
    config |= {k: v for k in ("accumulate", "shard") if (v := getattr(args, k)) is not None}
    return train.build(config, devices=devices(args.topology))


def _of_recipe(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    from dyntoken.config import load

    config = load(args.config).to_dict()
    config["model"] |= {**cli.overrides(args), **given}
    teacher = config.get("teacher") or {}
    if teacher.get("name"):
        config["teacher"] = {**teacher, **given, "weights": teacher.get("weights") or "unread"}
    return config


def _of_name(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """The config of a model without a recipe, on fake images of its own shape."""
    from dyntoken.models import split_name

    model = cli.build(args, **given)
    of_data = ("img_size", "in_chans", "num_classes")
    own = {key: value for key, value in cli.overrides(args).items() if key not in of_data}
    height, width, channels = model.input_shape
    shape = {"image_size": height, "channels": channels, "num_classes": model.num_classes}
    config: dict[str, Any] = {
        "model": {"name": args.name, **own, **given},
        "data": {"name": "fake", "size": (height, width), "options": {**shape, "train": 1281167}},
        "steps": 1,
        "ema": 0.9999,
        "losses": {"ce": {}},
        "optim": {"lr": 1e-3, "weight_decay": 0.05},
        "mix": {"mixup": 0.8, "cutmix": 1.0},
    }
    if any(site.reducer(parent=None).learns_share() for site in model.sites()):
        config["losses"]["keep_ratio"] = {"weight": 2.0}
    if args.teacher:
        config["teacher"] = {"name": split_name(args.name)[1], "weights": "unread", **given}
        config["losses"] |= {"logit_kl": {"weight": 0.5}, "token_distill": {"weight": 0.5, "variant": "kl"}}
    return config


def request(args: argparse.Namespace, run: Any) -> dict[str, Any]:
    """What a report depends on, besides the code: the program, the chips, the versions."""
    settings, train = run.settings, args.train
    name, count, hbm = chips(args.topology)
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "libtpu")}
    return {
        "model": {key: value for key, value in settings.plain["model"].items() if value is not None},
        "config": args.config,
        "step": "train" if train else "eval",
        "losses": sorted(settings.losses) if train else [],
        "teacher": (settings.teacher or {}).get("name") if train else None,
        "topology": name,
        "chips": count,
        "batch_per_chip": args.batch,
        "accumulate": settings.accumulate if train else 1,
        "shard": settings.shard if train else "none",
        "hbm_gib": hbm,
        "versions": {"dyntoken": __version__, **versions},
    }


def stored(path: pathlib.Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """A report from an earlier run, unless it answers another request."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    same = all(found.get(key) == value for key, value in json.loads(json.dumps(wanted)).items())
    return found if same else None


def slug(wanted: dict[str, Any]) -> str:
    """File name of a report, from what a reader would tell it by."""
    model = dict(wanted["model"])
    parts = [model.pop("name"), wanted["step"], wanted["topology"].replace(":", "-")]
    parts += [f"b{wanted['batch_per_chip']}"]
    parts += ["teacher"] if wanted["teacher"] else []
    parts += [f"accumulate{wanted['accumulate']}"] if wanted["accumulate"] > 1 else []
    parts += [f"shard-{wanted['shard']}"] if wanted["shard"] != "none" else []
    parts += [
        key if value is True else f"{key}-{value}" if key != "dtype" else str(value)
        for key, value in sorted(model.items())
    ]
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in "_".join(map(str, parts)))


def compiled(args: argparse.Namespace, run: Any) -> dict[str, Any]:
    """Compiles and reads off the program; what does not fit is reported, not raised."""
    import jax

    from dyntoken.analysis import hlo
    from dyntoken.ops import backend

    began, busy = time.monotonic(), time.process_time()
    refused = step = None
    try:
        with backend.trace_for("tpu"):
            step = run.train_step if args.train else run.eval_step
    except jax.errors.JaxRuntimeError as error:
        refused = cli.one_line(error)[:300]
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise ValueError(f"the compiler refuses: {refused}") from error
    # The processor's time says more than the clock of a machine that does other things, too.
    cpu = round(time.process_time() - busy, 1)
    took = {"compile_s": round(time.monotonic() - began, 1), "compile_cpu_s": cpu}
    if step is None:
        return {**took, "refused": refused}
    try:
        program = step.as_text()
    except jax.errors.JaxRuntimeError as error:  # libtpu 0.0.52 could not for a training step on v6e
        raise ValueError(
            f"compiled, but the compiler cannot write it out: {cli.one_line(error)[:300]}"
        ) from error
    if args.hlo:
        pathlib.Path(args.hlo).write_text(program)
    return {**took, "memory": memory(step), **hlo.summary(program)}


def memory(step: Any) -> dict[str, int]:
    """What a compiled program needs of a chip's memory, in bytes."""
    found = step.memory_analysis()
    arguments, results = found.argument_size_in_bytes, found.output_size_in_bytes
    held = arguments + results - found.alias_size_in_bytes
    parts = {"arguments": arguments, "held": held, "temporary": found.temp_size_in_bytes}
    parts["code"] = found.generated_code_size_in_bytes
    return {**parts, "total": held + parts["temporary"] + parts["code"]}


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
