"""Class names and probabilities of pictures.

Predicts the classes of pictures with a trained run: its model, its image size
and normalisation, its class names; or with weights (--model where these do not
tell it), prepared as the files beside them say. Prints a table; --out writes it
as CSV.

FOLDER stands for all pictures in it and in its sub-folders. A file that is no
picture is named and left out, and the exit status is then 1. With --out, what was
killed goes on where it was when the same command is given again.

examples:
  python -m dyntoken.tools.predict --workdir=runs/mine photos
  python -m dyntoken.tools.predict --workdir=runs/mine --top=3 --out=guesses.csv cat.jpg dog.png
  python -m dyntoken.tools.predict --weights=hf:facebook/deit-tiny-patch16-224 photos
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyntoken.tools import cli, pictures

if TYPE_CHECKING:
    import numpy as np

SHOWN = 100  # pictures: of more, --out has the table alone


def arguments(parser: cli.Parser) -> None:
    """The options."""
    pictures.add(parser)
    parser.add_argument(
        "--thresholds",
        type=cli.floats,
        metavar="T,T,...",
        help="of a model with exits, one per exit but the last: pictures leave early, and the table says where",
    )
    parser.add_argument(
        "--rule", default="confidence", help="exit rule of --thresholds (default: confidence)"
    )
    parser.add_argument("--top", type=cli.positive, help="classes per picture (default: 1, in a file 5)")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="also write the table there")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The classes of each picture, and a line for each file that is none."""
    from dyntoken.tools import parts

    pictures.take_run(args)
    paths = pictures.listed(args.picture)
    top = args.top or (5 if args.out else 1)
    predictor = pictures.predictor(args, top=top, thresholds=args.thresholds, rule=args.rule)
    pictures.remark(paths, predictor)
    jobs = pictures.parts(paths, args.batch)
    stored = parts.Parts(args.out, pictures.plan(paths, predictor)) if args.out else None
    make = lambda job: pictures.columns(predictor, job)  # noqa: E731
    result: dict[str, Any] = {"predictions": [], "failed": []}
    shown = args.json or not args.out or len(paths) <= SHOWN
    for part in pictures.watched(parts.run(jobs, make, stored), len(paths)):
        result["failed"] += pictures.failed(part)
        if shown:
            result["predictions"] += predictions(part)
    if stored is not None:

        def write(path: Path) -> None:
            rows = itertools.chain.from_iterable(map(predictions, parts.run(jobs, make, stored)))
            with path.open("w", newline="") as file:
                csv.writer(file).writerows(_rows(rows))

        stored.finish(write)
        result["written"] = str(args.out)
    return result


def predictions(part: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """What is said of each picture of a part, the surest class first."""
    found = []
    for row in (part["error"] == "").nonzero()[0]:
        pairs = zip(part["top_class"][row].tolist(), part["top_prob"][row].tolist(), strict=True)
        classes = [{"class": name, "probability": share} for name, share in pairs]
        exit_ = {"exit": int(part["exit"][row])} if "exit" in part else {}
        found.append({"file": str(part["file"][row]), "classes": classes, **exit_})
    return found


def _rows(predictions: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    """A header and a line per picture."""
    rows = iter(predictions)
    first = next(rows, {"classes": [None]})
    exit_ = ["exit"] if "exit" in first else []
    header = ["file", "class", "probability"]
    more = (f"{what}_{n}" for n in range(2, len(first["classes"]) + 1) for what in header[1:])
    yield [*header, *more, *exit_]
    for row in itertools.chain([first] if "file" in first else [], rows):
        pairs = ((one["class"], f"{one['probability']:.4f}") for one in row["classes"])
        yield [row["file"], *(text for pair in pairs for text in pair), *(str(row[name]) for name in exit_)]


def report(found: dict[str, Any]) -> str:
    """The table."""
    lines = [cli.table([*_rows(found["predictions"])])] if found["predictions"] else []
    return "\n".join(lines + ([f"written: {found['written']}"] if "written" in found else []))


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
