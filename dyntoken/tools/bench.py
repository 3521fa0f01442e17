"""Speed of a model against its dense counterpart.

Times two models in turn on the device at hand and takes their ratio pair by
pair: model only (no data loading), random images and weights, after warm-up.
"share of ideal" is the speed-up over the ratio of multiply-adds. Early exit is
timed by bench_exits, the input of a recipe by bench_input.

examples:
  python -m dyntoken.tools.bench dtps_deit_small_patch16_224 --batch=32
  python -m dyntoken.tools.bench dtps_deit_small_patch16_224 --vs dynamicvit_deit_small_patch16_224
  python -m dyntoken.tools.bench evit_deit_tiny_patch16_224 --train --dtype=bfloat16 --json
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dyntoken.tools import cli


def arguments(parser: cli.Parser) -> None:
    """The options."""
    cli.add_model(parser)
    parser.add_argument(
        "--vs", metavar="NAME", help="model to compare with; by default the dense counterpart"
    )
    parser.add_argument("--batch", type=cli.positive, default=16, help="images at a time (default 16)")
    parser.add_argument("--pairs", type=cli.positive, default=20, help="timed pairs (default 20)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute type")
    parser.add_argument(
        "--train",
        action="store_true",
        help="time a training pass (forward, cross-entropy, gradient; no optimizer) instead of evaluation",
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times both; the first model is the baseline.

    `share_of_ideal` is null where a model trains in mask form, which computes
    every token and only pretends to drop.
    """
    from dyntoken.analysis import macs, timing

    models = _models(args)
    make = timing.training if args.train else timing.evaluation
    runs = [
        make(model, timing.random_variables(model), timing.random_images(model, args.batch))
        for model in models.values()
    ]
    gmacs = [macs.count(model).gmacs for model in models.values()]
    timed = timing.compare(*runs, pairs=args.pairs)
    masked = args.train and any(
        site.reducer(stage=stage, parent=None).resolved(True) == "mask"
        for model in models.values()
        for stage, site in enumerate(model.sites())
    )
    return {
        "device": timing.device(),
        "mode": "train" if args.train else "eval",
        "dtype": args.dtype,
        "batch": args.batch,
        "pairs": args.pairs,
        "models": [
            {
                "name": name,
                "images_per_s": times.images_per_s(args.batch),
                "latency_ms": 1e3 * times.latency,
                "gmacs": cost,
            }
            for name, cost, times in zip(models, gmacs, (timed.first, timed.second), strict=True)
        ],
        "ratio": timed.ratio,
        "ratio_quartiles": list(timed.spread),
        "gmac_ratio": gmacs[0] / gmacs[1],
        "share_of_ideal": None if masked else timed.ratio * gmacs[1] / gmacs[0],
    }


def _models(args: argparse.Namespace) -> dict[str, Any]:
    """The baseline and the model, by name, built for the same images."""
    from dyntoken.models import OF_SITES, create_model, of_method, split_name
    from dyntoken.reducers import METHODS

    _, dense = split_name(args.name)
    other = args.vs or dense
    if other == args.name:
        raise ValueError(f"{args.name} is dense: name a second model with --vs")
    given = {**cli.overrides(args), "dtype": args.dtype}
    of_methods = OF_SITES.union(*map(of_method, METHODS))
    shared = {key: value for key, value in given.items() if key not in of_methods}
    return {other: create_model(other, **shared), args.name: create_model(args.name, **given)}


def report(found: dict[str, Any]) -> str:
    """The comparison as text."""
    what = "training pass (forward, loss, gradient)" if found["mode"] == "train" else "evaluation"
    rows = [["model", "images/s", "ms per batch", "GMACs"]]
    for row in found["models"]:
        cells = f"{row['images_per_s']:.1f}", f"{row['latency_ms']:.2f}", f"{row['gmacs']:.3f}"
        rows.append([row["name"], *cells])
    low, high = found["ratio_quartiles"]
    share = found["share_of_ideal"]
    ideal = "training in mask form computes every token" if share is None else f"{100 * share:.0f} % of ideal"
    return (
        f"{what}, random weights, batch {found['batch']}, {found['dtype']}, {found['device']}\n\n"
        f"{cli.table(rows)}\n\n"
        f"speed-up {found['ratio']:.2f} (quartiles {low:.2f} to {high:.2f} of {found['pairs']} pairs), "
        f"multiply-adds {found['gmac_ratio']:.2f} times fewer: {ideal}"
    )


MOVED = {"--input": "bench_input", "--exits": "bench_exits"}
main = cli.tool(__spec__.name, __doc__, arguments, measure, report, moved=MOVED)
if __name__ == "__main__":
    sys.exit(main())
