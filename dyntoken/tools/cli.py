"""What the programs share: their frame, the options of a model, tables.

A program is a module that ends with

    main = cli.tool(__spec__.name, __doc__, arguments, measure, report)

`arguments(parser)` declares its options, `measure(args)` does the work and returns a dict (or a
list of rows) of plain values, `report(result)` puts it into words. The frame adds `--json`, which
prints the result itself, and `--plugins`, and ends what a user did wrong in one line. It needs no
jax: what does is imported by `measure`, so that --help and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dyntoken import compilation_cache, interrupt, schema
from dyntoken.registry import load_plugins

if TYPE_CHECKING:
    from dyntoken.models import Model

USER_ERRORS = (ValueError, OSError, ImportError)


class UsageError(ValueError):
    """Options that do not go together; the exit status is 2, as for an unknown one."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; exit status 2.

    Args:
      prog: the command that it is of.
      text: what it does, and after a line "examples:" some commands.
    """

    def __init__(self, prog: str, text: str):
        super().__init__(
            prog=prog,
            description=text,
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


def tool(
    name: str,
    text: str,
    arguments: Callable[[Parser], None],
    measure: Callable[[argparse.Namespace], Any],
    report: Callable[[Any], str],
    *,
    moved: Mapping[str, str] | None = None,
) -> Callable[..., int]:
    """The `main` of a program: from arguments (by default those of the process) to the exit status.

    `main(argv, prog)` calls itself `prog` in messages, by default `python -m` and the module.

    Args:
      name: `__spec__.name` of its module, which holds under `python -m`, too.
      text: see `Parser`.
      arguments: declares the options.
      measure: from the options to the result; `args.argv` has the words themselves. A result with
        "failed", some lines, is printed, these on stderr, and the status is 1.
      report: the result in words.
      moved: options that have become programs of their own, by name.
    """

    def main(argv: Sequence[str] | None = None, prog: str = f"python -m {name}") -> int:
        argv = sys.argv[1:] if argv is None else list(argv)
        parser = Parser(prog, text)
        arguments(parser)
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
        parser.add_argument("--compilation_cache", default="", metavar="FOLDER", help=compilation_cache.HELP)
        for option in {word.partition("=")[0] for word in argv} & set(moved or ()):
            parser.error(f"{option} is a program of its own, python -m dyntoken.tools.{moved[option]}")
        args = parser.parse_intermixed_args(argv)
        args.argv = argv
        if interrupt.is_program() and sys.stderr.isatty():
            print("starting takes some seconds", file=sys.stderr, flush=True)
        try:
            if interrupt.is_program() or args.compilation_cache:  # not of a function that someone calls
                compilation_cache.use(args.compilation_cache)
            result = measure(args)
            if shown := json.dumps(result) if args.json else report(result):
                print(shown)
        except UsageError as error:
            parser.error(str(error))
        except USER_ERRORS as error:
            print(f"{parser.prog}: error: {one_line(error)}", file=sys.stderr)
            return 1
        failed = result.get("failed") if isinstance(result, dict) else None
        for line in failed or ():
            print(line, file=sys.stderr)
        return 1 if failed else 0

    return main


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
    group.add_argument("--fuse", help="what becomes of dropped tokens: squeeze, mean, one_token, drop, ...")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        type=assignment,
        dest="more",
        help="any other keyword of create_model (num_classes=10, in_chans=1, form=mask); may be repeated",
    )


def add_prefer(parser: argparse.ArgumentParser) -> None:
    """Adds `--prefer`, the weights to take from a run that keeps their average, too."""
    parser.add_argument(
        "--prefer",
        choices=("ema", "params"),
        default="ema",
        help="where there are both: the average of the weights (ema, the default) or the weights themselves",
    )


def is_folder(name: str) -> bool:
    """Whether NAME is a folder, where the workdir of a run may stand, not a model.

    Raises:
      ValueError: a path to nothing.
    """
    from dyntoken import paths

    if "/" not in name and os.sep not in name:
        return os.path.isdir(name)
    path = paths.resolve(name)
    if not path.exists():
        raise ValueError(f"no run in {name}: give the workdir of a training run")
    return path.is_dir()


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `create_model` that were given."""
    named = {key: getattr(args, key) for key in ("keep", "at", "img_size", "fuse")}
    return {**{key: value for key, value in named.items() if value is not None}, **dict(args.more)}


def build(args: argparse.Namespace, **more: Any) -> Model:
    """The model that NAME and its options describe."""
    from dyntoken.models import create_model

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


def counted(number: int, noun: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells to aligned lines; the first column to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def short(number: float) -> str:
    """A count with a unit: 57.80 M, 2.992 G."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale:
            return f"{number / scale:.{3 if unit == 'G' else 2}f} {unit}"
    return f"{number:.0f}"
