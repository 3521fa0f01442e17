"""Weights between formats.

Converts a weight file. IN may be in timm's keys, in those of transformers,
DINOv2, DynamicViT, TPS or EViT, or in ours: .safetensors, .npz, .pth (with
torch), a folder, a workdir, hf:org/name or https://...#sha256=.... Without
--model the architecture is read off IN. OUT is .safetensors in our own keys;
with --to=timm .safetensors or .npz in the keys and layouts of the public
checkpoints; with --to=transformers a folder that its from_pretrained opens
(ViT, DeiT, DINOv2, DINOv3; without what a reduction method adds).

examples:
  python -m dyntoken.tools.convert deit.pth deit.safetensors --model=deit_small_patch16_224
  python -m dyntoken.tools.convert hf:facebook/dinov2-small dinov2.safetensors
  python -m dyntoken.tools.convert runs/dtps timm.npz --model=dtps_deit_small_patch16_224 --to=timm
  python -m dyntoken.tools.convert deit.safetensors deit_folder --to=transformers
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyntoken.tools import cli

SUFFIXES = {"ours": (".safetensors",), "timm": (".safetensors", ".npz"), "transformers": ("",)}
ADDRESSES = ("hf:", "pretrained:", "http")  # no paths
WRITES = {"transformers": "a folder"}


def arguments(parser: cli.Parser) -> None:
    """The options."""
    parser.add_argument("source", metavar="IN", help="weights to read")
    parser.add_argument("target", metavar="OUT", help="file to write")
    parser.add_argument(
        "--model", dest="name", metavar="NAME", help="model the weights belong to (default: as IN tells)"
    )
    parser.add_argument("--to", choices=tuple(SUFFIXES), default="ours", help="keys of OUT (default: ours)")
    cli.add_prefer(parser)
    parser.add_argument(
        "--partial",
        action="store_true",
        help="accept arrays that IN lacks (they start fresh) or that the model has no place for (left out)",
    )
    cli.add_model_options(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Converts one file."""
    from etils import epath

    from dyntoken import weights
    from dyntoken.weights import files, runs

    suffix = Path(args.target).suffix.lower()
    if suffix not in SUFFIXES[args.to]:
        writes = WRITES.get(args.to) or " or ".join(SUFFIXES[args.to])
        raise ValueError(f"{args.target}: --to={args.to} writes {writes}")
    if not args.source.startswith(ADDRESSES) and not epath.Path(args.source).exists():
        raise ValueError(f"{args.source}: no such weight file or workdir")
    logging.getLogger("dyntoken.weights").addHandler(logging.NullHandler())  # its report is printed here
    options = {
        "prefer": args.prefer,
        "unexpected": "ignore" if args.partial else "error",
        "return_report": True,
    }
    if args.name is None:
        model, variables, loaded = weights.load_pretrained(args.source, **options, **cli.overrides(args))
    else:
        model = cli.build(args)
        variables, loaded = weights.load_weights(model, args.source, **options)
        model = weights.prepared(model, args.source)
    misfits = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what in ("missing", "unexpected")
        if (names := getattr(loaded, what))
    ]
    if args.name and misfits and not args.partial:
        raise ValueError(
            f"{args.source} does not fit {args.name} exactly: {', '.join(misfits)}; "
            "name another --model, or add --partial"
        )
    names = weights.class_names(args.source)
    names = names if len(names) == model.num_classes else ()
    if args.to == "ours":
        weights.save_weights(args.target, variables, model=model, class_names=names)
    elif args.to == "transformers":
        _write_transformers(epath.Path(args.target), model, variables, names)
    else:
        tensors = weights.with_buffers(model, weights.export_reference(model, variables))
        if suffix == ".npz":
            files.write_npz(args.target, tensors)
        else:
            about = {**runs.grids(model), **runs.images_said(model, names)}
            files.write_safetensors(args.target, tensors, {"format": "pt", **about})
    return {"read": str(loaded), "written": args.target}


def _write_transformers(folder: Any, model: Any, variables: Any, names: Sequence[str]) -> None:
    from dyntoken import preprocessing, weights
    from dyntoken.weights import configs, files, pixels

    tensors, config = weights.to_transformers(model, variables, names)
    processor = pixels.processor_of(preprocessing.preprocess(model))
    folder.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    for name, content in ((configs.FILE, config), (pixels.FILE, processor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def report(found: dict[str, Any]) -> str:
    """What was read and written."""
    return f"{found['read']}\nwritten: {found['written']}"


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
