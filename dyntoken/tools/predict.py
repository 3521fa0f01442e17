"""Class names and probabilities of pictures.

Predicts the classes of pictures with a trained run: its model, its image size
and normalisation, its class names. Prints a table; --out writes it as CSV.

FOLDER stands for all pictures in it and in its sub-folders. A file that is no
picture is named and left out, and the exit status is then 1.

examples:
  python -m dyntoken.tools.predict --workdir=runs/mine photos
  python -m dyntoken.tools.predict --workdir=runs/mine --top=3 --out=guesses.csv cat.jpg dog.png
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyntoken.tools import cli

if TYPE_CHECKING:
    from dyntoken.runs import Run

Guess = list[tuple[str, float]]  # (class, probability), the surest first


def arguments(parser: cli.Parser) -> None:
    """The options."""
    parser.add_argument(
        "picture", metavar="FOLDER_OR_IMAGE", nargs="+", help="picture file, or folder of them"
    )
    parser.add_argument("--workdir", required=True, help="folder of a training run")
    parser.add_argument("--step", default="newest", help="checkpoint: newest, best or a number")
    cli.add_prefer(parser)
    parser.add_argument("--top", type=cli.positive, default=1, help="classes per picture (default: 1)")
    parser.add_argument("--batch", type=cli.positive, default=32, help="pictures at a time (default: 32)")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="also write the table there")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The classes of each picture, and a line for each file that is none."""
    from dyntoken.runs import load_run
    from dyntoken.tools import colour

    paths = pictures(args.picture)
    logging.getLogger("dyntoken.data.stream").addHandler(logging.NullHandler())  # said here
    run = load_run(args.workdir, step=args.step, prefer=args.prefer)
    told = colour.remark(paths, run.preprocess.channels)
    if told:
        print(f"note: {told}", file=sys.stderr)
    result = {"predictions": [], "failed": []}
    for path, guess in zip(paths, predict(run, paths, args.top, args.batch), strict=True):
        if guess is None:
            result["failed"].append(f"{path}: not a picture that can be decoded; left out")
        else:
            classes = [{"class": name, "probability": share} for name, share in guess]
            result["predictions"].append({"file": path, "classes": classes})
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            csv.writer(file).writerows(_rows(result["predictions"]))
        result["written"] = str(args.out)
    return result


def pictures(words: Sequence[str]) -> list[str]:
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


def predict(run: Run, paths: Sequence[str], top: int, batch: int) -> Iterator[Guess | None]:
    """The `top` surest classes of each file, None for one that does not decode; a model with exits by its last.

    Compiles the model when there is a picture for it, not before.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dyntoken.data.files import read_files

    how = run.preprocess

    @jax.jit
    def probabilities(variables, images):
        logits = run.model.apply(variables, images).logits
        return jax.nn.softmax((logits[-1] if logits.ndim == 3 else logits).astype(jnp.float32))

    reading = {"size": how.size, "crop_pct": how.crop_pct, "interpolation": how.interpolation}
    batch = min(batch, len(paths))
    for images, good in read_files(paths, channels=how.channels, batch=batch, **reading):
        if not good.any():
            yield from [None] * len(images)
            continue
        padded = np.zeros((batch, *images.shape[1:]), np.uint8)  # one compilation, also for the last batch
        padded[: len(images)] = images
        shares = np.asarray(probabilities(run.variables, how(padded)))
        for row, fine in zip(shares, good, strict=False):
            best = np.argsort(-row, kind="stable")[:top]
            yield [(run.name(int(i)), float(row[i])) for i in best] if fine else None


def _rows(predictions: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A header and a line per picture."""
    count = max((len(row["classes"]) for row in predictions), default=1)
    header = ["file", "class", "probability"]
    header += [f"{what}_{n}" for n in range(2, count + 1) for what in header[1:3]]
    rows = [header]
    for row in predictions:
        pairs = ((one["class"], f"{one['probability']:.4f}") for one in row["classes"])
        rows.append([row["file"], *(text for pair in pairs for text in pair)])
    return rows


def report(found: dict[str, Any]) -> str:
    """The table."""
    parts = [cli.table(_rows(found["predictions"]))] if found["predictions"] else []
    return "\n".join(parts + ([f"written: {found['written']}"] if "written" in found else []))


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
