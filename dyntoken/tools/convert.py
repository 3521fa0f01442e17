"""Weights between formats: `python -m dyntoken.tools.convert IN OUT --model=NAME`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from dyntoken.tools import cli
from dyntoken.weights import export_reference, files, load_weights, runs, save_weights, with_buffers

TEXT = """\
Converts a weight file. IN may be in timm's (DeiT's) keys, in those of
DynamicViT, TPS or EViT, or in ours: .safetensors, .npz, .pth (with torch), a
workdir, or hf:org/name. OUT is .safetensors in our own keys, or with --to=timm
.safetensors or .npz in the keys and layouts of the public checkpoints."""
EXAMPLES = """\
  python -m dyntoken.tools.convert deit.pth deit.safetensors --model=deit_small_patch16_224
  python -m dyntoken.tools.convert runs/dtps timm.npz --model=dtps_deit_small_patch16_224 --to=timm"""
SUFFIXES = {"ours": (".safetensors",), "timm": (".safetensors", ".npz")}


@cli.program
def main(argv: Sequence[str] | None = None) -> int:
    """Converts one file; returns the exit status."""
    args = _parser().parse_args(argv)
    suffix = Path(args.target).suffix.lower()
    if suffix not in SUFFIXES[args.to]:
        raise ValueError(f"{args.target}: --to={args.to} writes {' or '.join(SUFFIXES[args.to])}")
    if not args.source.startswith(("hf:", "pretrained:")) and not epath.Path(args.source).exists():
        raise ValueError(f"{args.source}: no such weight file or workdir")
    model = cli.build(args)
    logging.getLogger("dyntoken.weights").addHandler(logging.NullHandler())  # its report is printed here
    variables, report = load_weights(
        model,
        args.source,
        prefer=args.prefer,
        unexpected="ignore" if args.partial else "error",
        return_report=True,
    )
    if (report.missing or report.unexpected) and not args.partial:
        raise ValueError(_misfit(args, report))
    if args.to == "ours":
        save_weights(args.target, variables, model=model)
    else:
        tensors = with_buffers(model, export_reference(model, variables))
        _write_official(args.target, suffix, tensors, runs.grids(model))
    print(f"{report}\nwritten: {args.target}")
    return 0


def _write_official(
    target: str, suffix: str, tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    if suffix == ".npz":
        files.write_npz(target, tensors)
    else:
        files.write_safetensors(target, tensors, {"format": "pt", **metadata})


def _parser() -> cli.Parser:
    parser = cli.Parser("convert", TEXT, EXAMPLES)
    parser.add_argument("source", metavar="IN", help="weights to read")
    parser.add_argument("target", metavar="OUT", help="file to write")
    parser.add_argument(
        "--model", dest="name", metavar="NAME", required=True, help="model the weights belong to"
    )
    parser.add_argument("--to", choices=tuple(SUFFIXES), default="ours", help="keys of OUT (default: ours)")
    parser.add_argument(
        "--prefer",
        choices=files.PREFERENCES,
        default="ema",
        help="where IN holds both (default: ema, the average)",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="accept arrays that IN lacks (they start fresh) or that the model has no place for (left out)",
    )
    cli.add_model_options(parser)
    return parser


def _misfit(args: argparse.Namespace, report: object) -> str:
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what in ("missing", "unexpected")
        if (names := getattr(report, what))
    ]
    what = f"{args.source} does not fit {args.name} exactly: {', '.join(parts)}"
    return f"{what}; name another --model, or add --partial"


if __name__ == "__main__":
    sys.exit(main())
