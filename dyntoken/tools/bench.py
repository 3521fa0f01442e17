"""Speed of a model against its dense counterpart: `python -m dyntoken.tools.bench NAME`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax

from dyntoken.analysis import macs, timing
from dyntoken.models import Model, create_model, split_name
from dyntoken.reducers import METHODS
from dyntoken.tools import bench_exits, cli

TEXT = """\
Times two models in turn on the device at hand and takes their ratio pair by
pair: model only (no data loading), random images and weights, after warm-up.
"share of ideal" is the speed-up over the ratio of multiply-adds. With --exits, a
cascade that stops early is compared with the same cascade running every exit.
tools.bench_input CONFIG times the input of a recipe."""
EXAMPLES = """\
  python -m dyntoken.tools.bench dtps_deit_small_patch16_224 --batch=32
  python -m dyntoken.tools.bench dtps_deit_small_patch16_224 --vs dynamicvit_deit_small_patch16_224
  python -m dyntoken.tools.bench evit_deit_tiny_patch16_224 --train --dtype=bfloat16 --json
  python -m dyntoken.tools.bench dvt_deit_small --exits=80,15,5 --batch=64"""
PAIRS = 20


@cli.program
def main(argv: Sequence[str] | None = None) -> int:
    """Times two models, or an input, and prints the comparison; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if cli.chooses(argv, "--input"):
        raise ValueError("--input is a program of its own: python -m dyntoken.tools.bench_input CONFIG")
    args = _parser().parse_args(argv)
    if args.exits:
        result = bench_exits.run(args)
        print(json.dumps(result) if args.json else bench_exits.report(result))
        return 0
    args.pairs = args.pairs or PAIRS
    models = _models(args)
    counts = [macs.count(model) for model in models.values()]
    make = timing.training if args.train else timing.evaluation
    runs = [_run(make, model, args.batch) for model in models.values()]
    timed = timing.compare(*runs, pairs=args.pairs)
    result = as_json(args, models, counts, timed)
    print(json.dumps(result) if args.json else report(result))
    return 0


def _parser() -> cli.Parser:
    parser = cli.Parser("bench", TEXT, EXAMPLES)
    cli.add_model(parser)
    parser.add_argument(
        "--vs", metavar="NAME", help="model to compare with; by default the dense counterpart"
    )
    parser.add_argument("--batch", type=cli.positive, default=16, help="images at a time (default 16)")
    parser.add_argument(
        "--pairs",
        type=cli.positive,
        help=f"timed pairs (default {PAIRS}; with --exits, {bench_exits.PAIRS})",
    )
    parser.add_argument(
        "--exits",
        type=bench_exits.shares,
        metavar="SHARES",
        help="percent of the images that leave at each exit of a cascade (80,15,5), spread evenly and "
        "forced: times the early-exit runner, batch by batch and streaming, against running all exits",
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="time a training pass (forward, cross-entropy, gradient; no optimizer) instead of evaluation",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute type")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _models(args: argparse.Namespace) -> dict[str, Model]:
    """The baseline and the model, by name, built for the same images."""
    _, dense = split_name(args.name)
    other = args.vs or dense
    if other == args.name:
        raise ValueError(f"{args.name} is dense: name a second model with --vs")
    given = {**cli.overrides(args), "dtype": args.dtype}
    reducing = {"at", *(f.name for row in METHODS.values() for f in dataclasses.fields(row.make))}
    shared = {key: value for key, value in given.items() if key not in reducing}
    return {other: create_model(other, **shared), args.name: create_model(args.name, **given)}


def _run(make: Any, model: Model, batch: int) -> timing.Run:
    return make(model, timing.random_variables(model), timing.random_images(model, batch))


def as_json(
    args: argparse.Namespace, models: dict[str, Model], counts: Sequence[macs.Count], timed: timing.Comparison
) -> dict[str, Any]:
    """The object that `--json` prints; the first model is the baseline.

    `share_of_ideal` is null where a model trains in mask form, which computes
    every token and only pretends to drop.
    """
    gmac_ratio = counts[0].total / counts[1].total
    masked = args.train and any(_trains_masked(model) for model in models.values())
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "mode": "train" if args.train else "eval",
        "dtype": args.dtype,
        "batch": args.batch,
        "pairs": args.pairs,
        "models": [
            {
                "name": name,
                "images_per_s": times.images_per_s(args.batch),
                "latency_ms": 1e3 * times.latency,
                "gmacs": count.gmacs,
            }
            for name, count, times in zip(models, counts, (timed.first, timed.second), strict=True)
        ],
        "ratio": timed.ratio,
        "ratio_quartiles": list(timed.spread),
        "gmac_ratio": gmac_ratio,
        "share_of_ideal": None if masked else timed.ratio / gmac_ratio,
    }


def _trains_masked(model: Model) -> bool:
    reducers = (site.reducer(stage=stage, parent=None) for stage, site in enumerate(model.sites()))
    return any(reducer.resolved(True) == "mask" for reducer in reducers)


def report(result: dict[str, Any]) -> str:
    """The comparison as text."""
    what = "training pass (forward, loss, gradient)" if result["mode"] == "train" else "evaluation"
    rows = [["model", "images/s", "ms per batch", "GMACs"]]
    for row in result["models"]:
        cells = f"{row['images_per_s']:.1f}", f"{row['latency_ms']:.2f}", f"{row['gmacs']:.3f}"
        rows.append([row["name"], *cells])
    low, high = result["ratio_quartiles"]
    share = result["share_of_ideal"]
    ideal = "training in mask form computes every token" if share is None else f"{100 * share:.0f} % of ideal"
    return "\n".join(
        [
            f"{what}, random weights, batch {result['batch']}, {result['dtype']}, {result['device']}",
            "",
            cli.table(rows),
            "",
            f"speed-up {result['ratio']:.2f} (quartiles {low:.2f} to {high:.2f} of {result['pairs']} pairs), "
            f"multiply-adds {result['gmac_ratio']:.2f} times fewer: {ideal}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
