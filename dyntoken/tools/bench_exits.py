"""Early exit at forced shares against all exits: `tools.bench NAME --exits=80,15,5`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from dyntoken.analysis import macs, timing
from dyntoken.eval.cascade import Runner
from dyntoken.tools import cli

PAIRS = 5
MOST = 20  # batches; longer periods are cut, and the rest of a stream is flushed
MODES = ("batch by batch", "streaming")


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


@dataclasses.dataclass(frozen=True)
class Timed:
    """One way of running a cascade against all its exits.

    Attributes:
      name: row of `MODES`.
      leave: the exit of every image, int32 `[batches, batch]`.
      comparison: all exits on one batch, against all the batches.
    """

    name: str
    leave: np.ndarray
    comparison: timing.Comparison

    @property
    def ratio(self) -> float:
        """Images per second over those of all exits."""
        return self.comparison.ratio * len(self.leave)

    def share_of_ideal(self, gmacs: np.ndarray) -> float:
        """The ratio over what multiply-adds promise: per image, all exits over the exits it needs."""
        return self.ratio * float(gmacs[self.leave].mean() / gmacs[-1])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Times both modes; the object that `--json` prints.

    Raises:
      ValueError: not one share per exit, or options that make no sense here.
    """
    if args.vs or args.train:
        raise ValueError("--exits compares a cascade with all its own exits: drop --vs and --train")
    model = cli.build(args, dtype=args.dtype)
    count = len(model.exits)
    if count != len(args.exits):
        have = f"{count} exits" if count else "no exits"
        raise ValueError(f"{args.name} has {have}, and --exits names {len(args.exits)} shares")
    gmacs = np.array(macs.gmacs(model))
    variables = timing.random_variables(model)
    images = timing.random_images(model, args.batch)
    whole = timing.evaluation(model, variables, images)
    runner = Runner(model, variables, np.zeros(count), batch=args.batch, devices=jax.devices()[:1])
    timed = [_time(name, runner, images, whole, args) for name in MODES]
    return _as_json(args, gmacs, timed)


def _time(name: str, runner: Runner, images: jax.Array, whole: timing.Run, args: argparse.Namespace) -> Timed:
    streams = name == "streaming"
    batches = period(args.exits, None if streams else args.batch)
    leave = schedule(args.exits, batches * args.batch).reshape(batches, args.batch)

    def early() -> Any:
        if streams:
            return [taken.logits for taken in runner.stream([images] * batches, leave=leave)]
        return [runner(images, leave=row).logits for row in leave]

    return Timed(name, leave, timing.compare(whole, early, pairs=args.pairs or PAIRS, warmup=1))


def _as_json(args: argparse.Namespace, gmacs: np.ndarray, timed: Sequence[Timed]) -> dict[str, Any]:
    device = jax.devices()[0]
    rows = [
        {
            "mode": one.name,
            "batches": len(one.leave),
            "shares": (np.bincount(one.leave.ravel(), minlength=len(gmacs)) / one.leave.size).tolist(),
            "images_per_s": one.comparison.second.images_per_s(one.leave.size),
            "all_exits_images_per_s": one.comparison.first.images_per_s(args.batch),
            "ratio": one.ratio,
            "ratio_quartiles": [bound * len(one.leave) for bound in one.comparison.spread],
            "gmac_ratio": float(gmacs[-1] / gmacs[one.leave].mean()),
            "share_of_ideal": one.share_of_ideal(gmacs),
        }
        for one in timed
    ]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "mode": "exits",
        "name": args.name,
        "dtype": args.dtype,
        "batch": args.batch,
        "pairs": args.pairs or PAIRS,
        "gmacs": gmacs.tolist(),
        "modes": rows,
        **{key: rows[-1][key] for key in ("ratio", "gmac_ratio", "share_of_ideal")},
    }


def report(result: dict[str, Any]) -> str:
    """The comparison as text."""
    last = result["modes"][-1]
    parts = " / ".join(f"{100 * share:.4g}" for share in last["shares"])
    rows = [["", "images/s", "all exits, images/s", "ratio", "quartiles", "ideal", "of ideal"]]
    for mode in result["modes"]:
        low, high = mode["ratio_quartiles"]
        rows.append(
            [
                f"{mode['mode']} ({mode['batches']} batches)",
                f"{mode['images_per_s']:.2f}",
                f"{mode['all_exits_images_per_s']:.2f}",
                f"{mode['ratio']:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{mode['gmac_ratio']:.2f}",
                f"{100 * mode['share_of_ideal']:.0f} %",
            ]
        )
    costs = ", ".join(f"{cost:.3f}" for cost in result["gmacs"])
    return "\n".join(
        [
            f"{result['name']}, {parts} % leave at each exit, "
            f"random weights, batch {result['batch']}, {result['dtype']}, {result['device']}",
            f"GMACs up to each exit: {costs}",
            "",
            cli.table(rows),
            "",
            f"streaming is {last['ratio']:.2f} times as fast as all exits ({result['pairs']} pairs), "
            f"multiply-adds {last['gmac_ratio']:.2f} times fewer: {100 * last['share_of_ideal']:.0f} % of ideal",
        ]
    )
