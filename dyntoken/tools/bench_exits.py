"""Speed of early exit against running all exits.

Times a cascade whose images leave at forced shares, spread evenly, batch by
batch and streaming, in turn with the same cascade running every exit on every
image: model only, random images and weights, after warm-up. "Of ideal" is the
speed-up over the ratio of multiply-adds.

examples:
  python -m dyntoken.tools.bench_exits dvt_deit_small --exits=80,15,5 --batch=64
  python -m dyntoken.tools.bench_exits dvt_dtps_deit_small --keep=0.7 --exits=50,30,20 --json
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from dyntoken.tools import cli

MOST = 20  # batches; longer periods are cut, and the rest of a stream is flushed


def arguments(parser: cli.Parser) -> None:
    """The options."""
    cli.add_model(parser)
    parser.add_argument(
        "--exits",
        type=shares,
        metavar="SHARES",
        required=True,
        help="percent of the images that leave at each exit (80,15,5), or fractions",
    )
    parser.add_argument("--batch", type=cli.positive, default=16, help="images at a time (default 16)")
    parser.add_argument("--pairs", type=cli.positive, default=5, help="timed pairs (default 5)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute type")


def shares(text: str) -> tuple[Fraction, ...]:
    """`80,15,5` (percent) or `0.8,0.15,0.05`, exactly: they sum to 100 or to 1."""
    try:
        values = [Fraction(str(share)) for share in cli.floats(text)]
    except argparse.ArgumentTypeError:
        values = [Fraction(-1)]
    total = sum(values)
    if min(values) < 0 or total not in (1, 100):
        raise argparse.ArgumentTypeError(
            f"{text!r} are no shares: give percent per exit that sum to 100 (80,15,5), "
            "or fractions that sum to 1"
        )
    return tuple(value / total for value in values)


def schedule(parts: Sequence[Fraction], images: int) -> np.ndarray:
    """The exit of each image, int32 `[images]`, every exit's images spread evenly."""
    leave = np.zeros(images, np.int32)
    tails = [sum(parts[index:]) for index in range(len(parts))]
    here = range(images)
    for index, (all_, rest) in enumerate(itertools.pairwise(tails), 1):
        share = rest / all_ if all_ else Fraction(0)
        here = [image for n, image in enumerate(here) if math.floor((n + 1) * share) > math.floor(n * share)]
        leave[here] = index
    return leave


def period(parts: Sequence[Fraction], batch: int | None = None) -> int:
    """The fewest batches in which every exit fills whole batches (or, given a batch, whole images)."""
    tails = [sum(parts[index:]) * (batch or 1) for index in range(1, len(parts))]
    return min(MOST, math.lcm(*(tail.denominator for tail in tails)))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times both modes.

    Raises:
      ValueError: not one share per exit.
    """
    import jax

    from dyntoken.analysis import macs, timing
    from dyntoken.eval.runner import Runner

    model = cli.build(args, dtype=args.dtype)
    count = len(model.exits)
    if count != len(args.exits):
        have = f"{count} exits" if count else "no exits"
        raise ValueError(f"{args.name} has {have}, and --exits names {len(args.exits)} shares")
    gmacs = np.array(macs.gmacs(model))
    variables = timing.random_variables(model)
    images = timing.random_images(model, args.batch)
    every = timing.evaluation(model, variables, images)
    runner = Runner(model, variables, np.zeros(count), batch=args.batch, devices=jax.devices()[:1])

    def calls(leave: np.ndarray) -> Any:
        return [runner(images, leave=row).logits for row in leave]

    def stream(leave: np.ndarray) -> Any:
        return [taken.logits for taken in runner.stream([images] * len(leave), leave=leave)]

    modes = [
        _time("batch by batch", calls, period(args.exits, args.batch), every, gmacs, args),
        _time("streaming", stream, period(args.exits), every, gmacs, args),
    ]
    return {
        "device": timing.device(),
        "mode": "exits",
        "name": args.name,
        "dtype": args.dtype,
        "batch": args.batch,
        "pairs": args.pairs,
        "gmacs": gmacs.tolist(),
        "modes": modes,
        **{key: modes[-1][key] for key in ("ratio", "gmac_ratio", "share_of_ideal")},
    }


def _time(
    name: str, run: Any, batches: int, every: Any, gmacs: np.ndarray, args: argparse.Namespace
) -> dict[str, Any]:
    """One way of running early exits on so many batches, against all exits on one batch."""
    from dyntoken.analysis import timing

    leave = schedule(args.exits, batches * args.batch).reshape(batches, args.batch)
    timed = timing.compare(every, lambda: run(leave), pairs=args.pairs, warmup=1)
    ideal = float(gmacs[-1] / gmacs[leave].mean())
    return {
        "mode": name,
        "batches": batches,
        "shares": (np.bincount(leave.ravel(), minlength=len(gmacs)) / leave.size).tolist(),
        "images_per_s": timed.second.images_per_s(leave.size),
        "all_exits_images_per_s": timed.first.images_per_s(args.batch),
        "ratio": timed.ratio * batches,
        "ratio_quartiles": [bound * batches for bound in timed.spread],
        "gmac_ratio": ideal,
        "share_of_ideal": timed.ratio * batches / ideal,
    }


def report(result: dict[str, Any]) -> str:
    """The comparison as text."""
    last = result["modes"][-1]
    parts = " / ".join(f"{100 * share:.4g}" for share in last["shares"])
    rows = [["", "images/s", "all exits, images/s", "ratio", "quartiles", "ideal", "of ideal"]]
    for mode in result["modes"]:
        low, high = mode["ratio_quartiles"]
        speeds = (mode[key] for key in ("images_per_s", "all_exits_images_per_s", "ratio"))
        cells = [f"{mode['mode']} ({mode['batches']} batches)", *(f"{speed:.2f}" for speed in speeds)]
        cells += [f"{low:.2f} to {high:.2f}", f"{mode['gmac_ratio']:.2f}"]
        rows.append([*cells, f"{100 * mode['share_of_ideal']:.0f} %"])
    return (
        f"{result['name']}, {parts} % leave at each exit, "
        f"random weights, batch {result['batch']}, {result['dtype']}, {result['device']}\n"
        f"GMACs up to each exit: {', '.join(f'{cost:.3f}' for cost in result['gmacs'])}\n\n"
        f"{cli.table(rows)}\n\n"
        f"streaming is {last['ratio']:.2f} times as fast as all exits ({result['pairs']} pairs), "
        f"multiply-adds {last['gmac_ratio']:.2f} times fewer: {100 * last['share_of_ideal']:.0f} % of ideal"
    )


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
