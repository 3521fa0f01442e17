"""A pretrained model with fewer tokens and no training: accuracy and measured speed of methods x keep rates.

Takes a checkpoint (any that load_pretrained reads) and a data set on disk. Where the checkpoint
has a classifier for the data's classes, accuracy is its top-1; else features are classified by
their neighbours, or by a linear probe, in a gallery that the dense model encoded. "agrees" is the
share of pictures that get the dense model's class, which needs no labels. "speed-up" is the time of
the dense model over that of the reduced one, measured pair by pair on this machine.

Rows that are finished are kept in OUT/sweep.csv: a command that was stopped goes on with the next.

examples:
  python -m dyntoken.tools.sweep dinov2_small --data=cifar10 --img_size=112 --out=sweep
  python -m dyntoken.tools.sweep model.safetensors --data=folder:photos --methods=etps,evit --keep=0.7,0.5 --out=sweep
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyntoken import progress
from dyntoken.tools import calibrate, cli

if TYPE_CHECKING:
    from dyntoken.models import Model

COLUMNS = ("method", "keep", "gmacs", "speed_up", "images_per_s", "accuracy", "agrees")


def arguments(parser: cli.Parser) -> None:
    """The options."""
    calibrate.add(parser)
    parser.add_argument(
        "--methods",
        type=lambda text: tuple(text.split(",")),
        help="names, or NAME:key=value:... (evit:fuse=drop); by default all that add no parameters",
    )
    parser.add_argument(
        "--keep", type=cli.floats, default=(0.9, 0.7, 0.5, 0.3), help="keep rates (default 0.9,0.7,0.5,0.3)"
    )
    parser.add_argument("--at", type=cli.ints, help="blocks that reduce; by default the method's own")
    parser.add_argument("--pairs", type=cli.positive, default=7, help="timed pairs a row (default 7)")
    parser.add_argument(
        "--retime",
        action="store_true",
        help="time the rows of OUT again, as on a machine that is quiet now; answers are kept",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for sweep.csv and sweep.png")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the rows that are not there yet, and draws them all."""
    if wrong := [rate for rate in args.keep if not 0 < rate <= 1]:
        raise ValueError(f"--keep={wrong[0]}: keep rates lie in (0, 1]")
    calibrate.check_data(args, args.split)  # what is refused is refused before anything is computed
    dense, variables = calibrate.load(args)
    if dense.num_classes != calibrate.classes(args):
        calibrate.check_data(args, args.gallery)
    table = Table(args.out, {key: str(value) for key, value in vars(args).items() if key in PLAN})
    clock = calibrate.Clock(args, dense, variables)
    if args.retime:
        found = table.rows()
        for row in found:
            model = dense if row["method"] == "dense" else _make(args, dense, row["method"], row["keep"])
            row["speed_up"], row["images_per_s"] = clock.speed(model, args.pairs)
        table.replace(found)
    else:
        _add(args, table, dense, variables, clock)
    rows = table.rows()
    draw(rows, args.out / "sweep.png", f"{dense.arch}, {args.data} {args.split}")
    return {
        "model": dense.arch,
        "data": args.data,
        "judged_by": calibrate.judged_by(args, dense),
        "rows": rows,
    }


def _make(args: argparse.Namespace, dense: Model, name: str, keep: float) -> Model:
    from dyntoken.models import reduced

    method, options = calibrate.method_of(name)
    at = {} if args.at is None else {"at": args.at}
    return reduced(dense, method, keep=keep, **at, **options)


def _add(
    args: argparse.Namespace, table: Table, dense: Model, variables: Any, clock: calibrate.Clock
) -> None:
    """Measures the rows that the table has not."""
    from dyntoken.analysis import macs

    models = {}
    for name, keep in itertools.product(args.methods or calibrate.training_free(dense), args.keep):
        try:
            models[name, keep] = _make(args, dense, name, keep)
        except ValueError as error:
            if args.methods:
                raise
            print(f"left out: {name} at keep {keep}: {error}", file=sys.stderr, flush=True)
            continue
        if extra := calibrate.fresh(models[name, keep], dense):
            raise ValueError(f"method {name!r} has parameters of its own ({extra[0]}, ...): train it first")
    todo = [key for key in models if (key[0], str(key[1])) not in table.done]
    missing = ("dense", "1.0") not in table.done
    if not todo and not missing:
        return
    judge = calibrate.Judge(args, dense, variables)
    if missing:
        speed = {"speed_up": 1.0, "images_per_s": clock.speed(dense, args.pairs)[1]}
        scores = {"accuracy": judge.accuracy(judge.answers), "agrees": 1.0}
        table.add({"method": "dense", "keep": 1.0, "gmacs": macs.count(dense).gmacs, **speed, **scores})
    for name, keep in progress.over(todo, "sweep", len(todo), unit="rows"):
        model = models[name, keep]
        ratio, rate = clock.speed(model, args.pairs)
        answers = judge.classes_of(model)
        scores = {"accuracy": judge.accuracy(answers), "agrees": judge.agreement(answers)}
        found = {"gmacs": macs.count(model).gmacs, "speed_up": ratio, "images_per_s": rate, **scores}
        table.add({"method": name, "keep": keep, **found})


# Options that decide what a row means.
PLAN = ("source", "name", "data", "split", "gallery", "probe", "img_size", "at", "dtype", "images")


class Table:
    """Rows in a CSV file, each written as soon as it is known.

    Raises:
      ValueError: the folder holds rows of other options.
    """

    def __init__(self, folder: Path, plan: dict[str, str]):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, about = folder / "sweep.csv", folder / "sweep.json"
        if about.exists() and json.loads(about.read_text()) != plan:
            raise ValueError(f"{folder} holds a sweep with other options ({about}): give another --out")
        about.write_text(json.dumps(plan, indent=2) + "\n")
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that a kill cut short is no row
        self.path.write_text(whole or ",".join(COLUMNS) + "\n")
        self.done = {(row["method"], row["keep"]) for row in self._stored()}

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row and says so."""
        text = _text(row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(text)
        line = " ".join(f"{key} {text[key]}" for key in COLUMNS if row[key] is not None)
        progress.beside(lambda said: print(said, file=sys.stderr, flush=True))(line)

    def replace(self, rows: list[dict[str, Any]]) -> None:
        """Writes other rows in place of all."""
        new = self.path.with_suffix(".new")
        with new.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(map(_text, rows))
        new.replace(self.path)

    def rows(self) -> list[dict[str, Any]]:
        """All rows, numbers as numbers; None where there are no labels."""
        return [
            {key: value if key == "method" else float(value) if value else None for key, value in row.items()}
            for row in self._stored()
        ]

    def _stored(self) -> Iterator[dict[str, str]]:
        with self.path.open(newline="") as file:
            yield from csv.DictReader(file)


def _text(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is written."""
    return {**row, **{key: f"{row[key]:.4f}" for key in COLUMNS[2:] if row[key] is not None}}


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Accuracy (or agreement) over measured speed-up, a line per method."""
    from dyntoken.analysis import figures

    labelled = all(row["accuracy"] is not None for row in rows)
    value = "accuracy" if labelled else "agrees"
    figure = figures.figure(6.4, 4.2)
    axis = figure.add_subplot()
    dense = next(row for row in rows if row["method"] == "dense")
    axis.axhline(dense[value], color=figures.FRAME, linewidth=0.8, linestyle="--", label="dense")
    for number, name in enumerate(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense")):
        points = sorted((r["speed_up"], r[value]) for r in rows if r["method"] == name)
        colour = figures.COLOURS[number % len(figures.COLOURS)]
        style = "o-" if number < len(figures.COLOURS) else "s--"
        axis.plot(*zip(*points, strict=True), style, color=colour, markersize=4, linewidth=1.2, label=name)
    figures.curves(
        axis, "speed-up over the dense model (measured)", "top-1" if labelled else "agreement with dense"
    )
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7, frameon=False, ncols=2)
    figures.save(figure, path)


def report(found: dict[str, Any]) -> str:
    """The table."""
    rows = [["method", "keep", "GMACs", "speed-up", "images/s", "accuracy", "agrees"]]
    for row in found["rows"]:
        accuracy = "" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}"
        speeds = f"{row['gmacs']:.3f}", f"{row['speed_up']:.2f}", f"{row['images_per_s']:.1f}"
        rows.append([row["method"], f"{row['keep']:g}", *speeds, accuracy, f"{100 * row['agrees']:.2f}"])
    return f"{found['model']} on {found['data']}, judged by {found['judged_by']}\n\n{cli.table(rows)}"


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
