"""Pictures on a command line, and the `Predictor` that its options describe."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyntoken import progress
from dyntoken.tools import cli

if TYPE_CHECKING:
    import numpy as np

    from dyntoken.predictor import Predictor

SILENT = 30.0  # seconds between two lines about progress where there is no terminal
BATCHES = 16  # in a part: what is read, predicted and written at a time


def add(parser: cli.Parser) -> None:
    """The pictures, the weights, and how many at a time."""
    parser.add_argument(
        "picture",
        metavar="FOLDER_OR_IMAGE",
        nargs="+",
        help="picture file, or folder of them; a run's workdir ahead of them is --workdir",
    )
    parser.add_argument("--workdir", help="folder of a training run")
    parser.add_argument("--step", default="newest", help="checkpoint: newest, best or a number")
    cli.add_prefer(parser)
    parser.add_argument("--model", metavar="NAME", help="model of --weights, where they do not tell it")
    parser.add_argument(
        "--weights",
        help="in place of --workdir: .safetensors, .npz, .pth, a folder, pretrained:NAME, or hf:org/name",
        metavar="SOURCE",
    )
    cli.add_model_options(parser)
    parser.add_argument("--batch", type=cli.positive, default=32, help="pictures at a time (default: 32)")


def take_run(args: argparse.Namespace) -> None:
    """A run's workdir ahead of the pictures becomes `--workdir`, where neither it nor --weights is given.

    Raises:
      UsageError: nothing is left.
    """
    from dyntoken import paths, workdirs

    if args.workdir is not None or args.weights is not None:
        return
    path = paths.resolve(args.picture[0])
    if not path.is_dir() or not workdirs.numbered(path / workdirs.FOLDER):
        return
    args.workdir, *args.picture = args.picture
    if not args.picture:
        raise cli.UsageError(f"{args.workdir} is a run: which pictures?")


def predictor(args: argparse.Namespace, **options: Any) -> Predictor:
    """What the options describe.

    Raises:
      UsageError: options that do not go together.
    """
    from dyntoken.predictor import Predictor

    options |= {"step": args.step, "prefer": args.prefer, "batch": args.batch}
    changed = cli.overrides(args)
    if (args.workdir is None) == (args.weights is None) or (args.model and args.workdir):
        raise cli.UsageError("give --workdir, or --weights, with --model where they do not tell it")
    if args.weights is not None:
        return Predictor(args.weights, model=args.model, options=changed, **options)
    if set(changed) - {"keep"}:
        raise cli.UsageError(f"--workdir knows its model: {', '.join(changed)} cannot be changed, --keep can")
    return Predictor(args.workdir, **changed, **options)


def listed(words: Sequence[str]) -> list[str]:
    """The files that some files and folders stand for, those of a folder in the order of their names.

    Raises:
      ValueError: no such file or folder, or a folder without pictures.
    """
    from dyntoken.data.decode import SUFFIXES

    found = []
    for path in map(Path, words):
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            inside = sorted(str(p) for p in inside if not p.name.startswith("."))
            if not inside:
                raise ValueError(f"{path}: no picture in this folder ({', '.join(SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(str(path))
        else:
            raise ValueError(f"{path}: no such picture or folder")
    return found


def remark(paths: Sequence[str], predictor: Predictor) -> None:
    """Says on stderr what is odd about the pictures' colours."""
    from dyntoken.tools import colour

    logging.getLogger("dyntoken.data.stream").addHandler(logging.NullHandler())  # said here
    if told := colour.remark(paths, predictor.opened.preprocess.channels):
        print(f"note: {told}", file=sys.stderr)


def plan(paths: Sequence[str], predictor: Predictor) -> dict[str, Any]:
    """All that a result depends on: see `parts.Parts`."""
    fields = {field.name: getattr(predictor, field.name) for field in dataclasses.fields(predictor)}
    files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    return {**fields, "origin": predictor.opened.origin, "files": files}


def columns(predictor: Predictor, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """What the predictor says of some files, without what it says of all classes."""
    found = predictor(list(paths))
    return {"file": _texts(paths), **{name: found[name] for name in found if name not in ("logits", "probs")}}


def _texts(words: Sequence[str]) -> np.ndarray:
    import numpy as np

    return np.array(words, np.str_)


def parts(paths: Sequence[str], batch: int) -> list[Sequence[str]]:
    """The files in parts of some batches: a part gives the same results wherever one begins."""
    step = BATCHES * batch
    return [paths[at : at + step] for at in range(0, len(paths), step)]


def failed(part: dict[str, np.ndarray]) -> list[str]:
    """A line for each file of a part that is no picture."""
    bad = part["error"] != ""
    return [f"{path}: not a picture that can be decoded; left out" for path in part["file"][bad].tolist()]


def watched(found: Iterable[dict[str, np.ndarray]], count: int) -> Iterator[dict[str, np.ndarray]]:
    """Passes parts on and says on stderr how far they are: a live line on a terminal, else a line now and then."""
    terminal, done = sys.stderr.isatty(), 0
    start = said = time.monotonic()
    with contextlib.closing(progress.bar("reading", count, unit="pictures")) as line:
        for part in found:
            done += len(part["file"])
            line.update(len(part["file"]))
            now = time.monotonic()
            if not terminal and now - said > SILENT:
                said, speed = now, done / max(now - start, 1e-9)
                left = (count - done) / speed
                print(
                    f"{done} of {count} pictures, {speed:.0f} per second, {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )
            yield part
