"""Speed of the input of a recipe: `tools.bench --input CONFIG`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from dyntoken import config as recipes
from dyntoken.data import input_speed
from dyntoken.data.requests import check_size
from dyntoken.tools import cli
from dyntoken.train.settings import read

TEXT = """\
Times how fast training images are made as CONFIG asks (decoding of the crop,
resizing, flip, RandAugment, batching) against decoding the same JPEGs alone, in
turn and on the same cores. Random erasing and mixup run on the device and are
not part of it.

The images are made from the photographs that scikit-image and scikit-learn
ship, 500 x 375 pixels as ImageNet's are: the data set itself is not needed."""
EXAMPLES = """\
  python -m dyntoken.tools.bench --input configs/tps_deit.py
  python -m dyntoken.tools.bench --input configs/dynamicvit_deit.py --batch=128 --steps=20 --json"""


def main(argv: Sequence[str]) -> int:
    """Times the input and prints the comparison; returns the exit status."""
    args = _parser().parse_args(argv)
    result = run(args.input, batch=args.batch, steps=args.steps, rounds=args.rounds)
    print(json.dumps(result) if args.json else report(result))
    return 0


def _parser() -> cli.Parser:
    parser = cli.Parser("bench", TEXT, EXAMPLES)
    parser.add_argument("--input", metavar="CONFIG", required=True, help="recipe, configs/FILE.py[:args]")
    parser.add_argument("--batch", type=cli.positive, default=64, help="images per batch (default 64)")
    parser.add_argument("--steps", type=cli.positive, default=8, help="batches per round (default 8)")
    parser.add_argument(
        "--rounds", type=cli.positive, default=3, help="rounds, the median counts (default 3)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def run(config: str, *, batch: int = 64, steps: int = 8, rounds: int = 3) -> dict[str, Any]:
    """Times the input of a recipe; the object that `--json` prints.

    Args:
      config: `FILE[:args]`.
      batch: images per batch.
      steps: batches per round.
      rounds: repetitions.

    Raises:
      ValueError: no such recipe, one for small images in memory, or no
        photographs.
    """
    chosen = read(recipes.load(config)).data
    augment, (height, width) = (
        dict(chosen.augment or {"crop": "none", "flip": 0.0}),
        check_size(chosen.size, None),
    )
    if height != width:
        raise ValueError(f"{config} has images of {height} x {width} pixels: only squares are timed")
    if augment.get("crop") == "pad":
        raise ValueError(
            f"{config} trains on images in memory, which nothing decodes: give a recipe for ImageNet, "
            "such as configs/tps_deit.py"
        )
    speed = input_speed.measure(augment, size=height, batch=batch, steps=steps, rounds=rounds)
    return {
        "mode": "input",
        "config": config,
        "augment": augment,
        "size": height,
        "batch": batch,
        "steps": steps,
        "rounds": rounds,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "decode_images_per_s": speed.decode,
        "input_images_per_s": speed.full,
        **{key: value for key, value in dataclasses.asdict(speed).items() if key not in ("decode", "full")},
    }


def report(result: dict[str, Any]) -> str:
    """The comparison as text."""
    rows = [
        ["", "images/s"],
        ["decoding alone", f"{result['decode_images_per_s']:.0f}"],
        ["whole input", f"{result['input_images_per_s']:.0f}"],
    ]
    changes = ", ".join(f"{key} {value}" for key, value in result["augment"].items() if value)
    return "\n".join(
        [
            f"input of {result['config']}, {result['size']} px, batch {result['batch']}, "
            f"{result['cores']} CPU core(s), JPEGs of {result['kilobytes']:.0f} kB",
            changes,
            "",
            cli.table(rows),
            "",
            f"the whole input runs at {result['ratio']:.2f} of the rate of decoding alone (median of "
            f"{result['rounds']} rounds), at {result['cpu_ratio']:.2f} by processor time",
        ]
    )
