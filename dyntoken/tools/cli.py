"""What the programs share: options of a model, and errors of one line."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dyntoken import schema
from dyntoken.models import Model, create_model
from dyntoken.reducers import FUSERS
from dyntoken.registry import load_plugins

Main = Callable[[Sequence[str] | None], int]
USER_ERRORS = (ValueError, OSError, ImportError)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; exit status 2."""

    def __init__(self, program: str, text: str, examples: str):
        super().__init__(
            prog=f"python -m dyntoken.tools.{program}",
            description=text,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--plugins",
            type=plugins,
            metavar="MODULE,...",
            help="modules to import first, which register methods, backbones, losses or data of their own",
        )

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (--help explains the options)\n")


def program(main: Main) -> Main:
    """Decorator: a bad input ends in one line on stderr and exit status 1."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except USER_ERRORS as error:
            name = main.__globals__["__spec__"].name  # also right under `python -m`
            print(f"python -m {name}: error: {one_line(error)}", file=sys.stderr)
            return 1

    return run


def chooses(argv: Sequence[str], option: str) -> bool:
    """Whether `--option` or `--option=value` is among the arguments."""
    return any(word.partition("=")[0] == option for word in argv)


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds NAME and the options that say how to build it."""
    parser.add_argument("name", metavar="NAME", help="model, e.g. dtps_deit_small_patch16_224")
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the overrides of `create_model`."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--keep",
        type=keep,
        help="share of the tokens that stay, expanded over the sites as the method's paper does (0.7), "
        "or one per site (0.7,0.5,0.3); whole numbers are token counts (137,96,67 or 137-96-67)",
    )
    group.add_argument("--at", type=ints, help="blocks that reduce, counted from 0 (3,6,9 or 3-6-9)")
    group.add_argument("--img_size", type=size, help="pixels, 224 or HEIGHTxWIDTH")
    group.add_argument("--fuse", help=f"what becomes of dropped tokens: {', '.join(FUSERS)}, ...")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        type=assignment,
        dest="more",
        help="any other keyword of create_model (num_classes=10, in_chans=1, form=mask); may be repeated",
    )


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `create_model` that were given."""
    named = {key: getattr(args, key) for key in ("keep", "at", "img_size", "fuse")}
    return {**{key: value for key, value in named.items() if value is not None}, **dict(args.more)}


def build(args: argparse.Namespace, **more: Any) -> Model:
    """The model that NAME and its options describe."""
    return create_model(args.name, **{**overrides(args), **more})


def plugins(text: str) -> tuple[str, ...]:
    """Imports `a.b,c.d`; the rows they register are known from then on."""
    try:
        return load_plugins(text)
    except (ImportError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def typed(kind: Any) -> Callable[[str], Any]:
    """For `add_argument(type=...)`: reads a text as an annotation of `schema` says."""

    def read(text: str) -> Any:
        try:
            return schema.check(kind, schema.Text(text), "it")
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: give {schema.describe(kind)}") from None

    return read


keep = typed(schema.Keep)
ints = typed(tuple[int, ...])
floats = typed(tuple[float, ...])
size = typed(schema.Size)
positive = typed(schema.Count)


def assignment(text: str) -> tuple[str, Any]:
    """`key=value`; the type of the keyword says what the value means."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, schema.Text(value)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells to aligned lines; the first column to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def short(number: float) -> str:
    """A count with a unit: 57.80 M, 2.992 G."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale:
            return f"{number / scale:.{3 if unit == 'G' else 2}f} {unit}"
    return f"{number:.0f}"
