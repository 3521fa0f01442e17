"""The papers' experiments, each with one command: networks fine-tuned from one dense checkpoint, and compared.

A study is a table of networks (dyntoken/studies/table.py), each trained by the training loop from the same dense
weights with the same recipe. What is finished is kept in OUT: a command that was killed goes on inside its run,
studies in one OUT share the networks that they have in common. Writes OUT/NAME.csv, OUT/NAME.md and OUT/NAME.png
after every network: mean and spread over the seeds, ties called ties, what was expected beside what was found.

The dense model is that of the recipe or of --source (any checkpoint that load_pretrained reads); one without a
classifier gets a linear one, fitted to its features of the training split.

examples:
  python -m dyntoken.tools.study tokens --out=studies
  python -m dyntoken.tools.study robustness --seeds=1 --only=attention-* --out=studies
  python -m dyntoken.tools.study tokens --source=dinov2_small --data=cifar10 --img_size=84 --set=batch=32 --out=studies
  python -m dyntoken.tools.study rivals --scale=imagenet --data_dir=gs://bucket/tfds --out=studies
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from dyntoken.tools import cli

RECIPE = "configs/study.py"
SCALES = {"tiny": f"{RECIPE}:tiny", "laptop": f"{RECIPE}:demo", "imagenet": RECIPE}


def arguments(parser: cli.Parser) -> None:
    """The options."""
    parser.add_argument("study", metavar="NAME", help="row of the table; list shows all with what each asks")
    parser.add_argument(
        "--source", help="dense weights, as load_pretrained takes them; by default the recipe's"
    )
    parser.add_argument(
        "--head", choices=("keep", "probe"), default="keep", help="probe: a new classifier for other classes"
    )
    parser.add_argument("--data", help="data set; by default the recipe's")
    parser.add_argument("--data_dir", help="where TFDS data sets lie")
    parser.add_argument("--img_size", type=cli.size, help="pixels; by default the recipe's")
    parser.add_argument("--seeds", type=cli.positive, default=3, help="seeds 0, 1, ... (default 3)")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), help="networks by pattern: *-drop-*,dense (default all)"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--scale", choices=SCALES, default="laptop", help="of configs/study.py (default laptop)"
    )
    group.add_argument("--config", help="FILE[:arguments], another recipe of a dense model")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        type=_change,
        dest="changes",
        help="a key of the recipe (batch=32, epochs=2, data.split=train[:2000]); may be repeated",
    )
    parser.add_argument("--out", type=Path, default=Path("studies"), help="results folder (default studies)")
    parser.add_argument("--report", action="store_true", help="only write the tables of what is there")


def _change(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures what is not there yet."""
    from dyntoken.studies import setting as settings
    from dyntoken.studies.pool import Pool, Stopped
    from dyntoken.studies.table import STUDIES

    if args.study == "list":
        return {"studies": {name: study.title for name, study in STUDIES.items()}}
    study = STUDIES[args.study]
    config = recipe(args)
    began = time.monotonic()
    setting = settings.prepare(config, args.source, args.out, probe=args.head == "probe", log=_say)
    trials = study.trials(setting)
    chosen = [t for t in trials if not args.only or any(fnmatch.fnmatch(t.name, word) for word in args.only)]
    if not chosen:
        names = ", ".join(trial.name for trial in trials)
        raise ValueError(f"--only={','.join(args.only)} matches no network of {args.study}: {names}")
    pool, failed = Pool(args.out, setting, _say), []
    left = [] if args.report else [(seed, trial) for seed in range(args.seeds) for trial in chosen]
    for seed, trial in left:
        try:
            pool.rows(args.study, study, trial, seed)
        except Stopped as stopped:
            _say("stopped: the same command goes on; finished networks are kept")
            raise SystemExit(128 + stopped.signum) from None
        except cli.USER_ERRORS as error:
            failed.append(f"{trial.name}, seed {seed}: {cli.one_line(error)}")
            _say(f"left out: {failed[-1]}")
            continue
        publish(args, setting, study, pool, trials)
    _say(f"{len(left)} networks in {time.monotonic() - began:.0f} s")
    return publish(args, setting, study, pool, trials) | {"failed": failed}


def recipe(args: argparse.Namespace) -> Any:
    """The config of the dense model."""
    from dyntoken import config as recipes
    from dyntoken.train import settings

    config = recipes.load(args.config or SCALES[args.scale])
    given = {"data.name": args.data, "data.data_dir": args.data_dir, "data.size": args.img_size}
    changes = {key: str(value) for key, value in given.items() if value is not None}
    if isinstance(args.img_size, tuple):
        changes["data.size"] = "x".join(map(str, args.img_size))
    if args.data is not None and "data.eval_split" not in dict(args.changes):
        changes.setdefault("data.eval_split", "validation" if args.data.startswith("imagenet") else "test")
    settings.override(config, [*changes.items(), *args.changes])
    return config


def publish(args: argparse.Namespace, setting: Any, study: Any, pool: Any, trials: Any) -> dict[str, Any]:
    """Writes the three files of everything that is there."""
    from dyntoken.analysis import figures
    from dyntoken.studies import report as reports
    from dyntoken.studies.setting import write

    order = {trial.name: number for number, trial in enumerate(trials)}
    stored = sorted(
        (network for network in pool.stored(args.study) if network["trial"] in order),
        key=lambda network: (order[network["trial"]], network["seed"]),
    )
    if not stored:
        raise ValueError(f"nothing was finished in {args.out / args.study}")
    rows = reports.summarize(study, stored, setting.top1)
    config = setting.config
    training = f"{config['steps']} steps" if config["steps"] else f"{config['epochs']:g} epochs"
    facts = {
        "command": f"`python -m dyntoken.tools.study {_portable(args.argv)}`",
        "data": f"{config['data']['name']}, {config['data']['split']} and {config['data']['eval_split']}",
        "training": f"{training} of {config['batch']} images",
        "dense": f"{setting.dense.arch} at {setting.dense.input_shape[0]} pixels, {setting.gmacs:.3f} GMACs, "
        f"top-1 {100 * setting.top1:.2f}, sites at {setting.at}",
        "training took": f"{sum(network['seconds'] for network in stored) / 60:.1f} minutes in all",
    }
    write(args.out / f"{args.study}.csv", reports.as_csv(args.study, study, stored))
    text = reports.markdown(args.study, study, rows, facts)
    write(args.out / f"{args.study}.md", text)
    try:
        figures.save(reports.draw(study, rows, (setting.gmacs, setting.top1)), args.out / f"{args.study}.png")
    except ModuleNotFoundError as error:
        _say(f"no picture: {error}")
    return {"study": args.study, "dense": setting.top1, "rows": stored, "text": text}


def _portable(words: list[str]) -> str:
    """A command without what another machine has elsewhere."""
    kept = [
        word for word in words if word.partition("=")[0] not in ("--json", "--data_dir", "--out", "--report")
    ]
    names = [f"--source={os.path.basename(w)}" if w.startswith("--source=/") else w for w in kept]
    return shlex.join(names)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report(found: dict[str, Any]) -> str:
    """The table."""
    if "studies" in found:
        width = max(map(len, found["studies"]))
        return "\n".join(f"{name:{width}}  {title}" for name, title in found["studies"].items())
    return found["text"]


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
