"""One command for all programs: `dyntoken NAME ...`, also `python -m dyntoken NAME ...`.

    dyntoken train --config=configs/tps_deit.py:demo --workdir=runs/demo
    dyntoken show runs/demo fashion_mnist_mini:7

`dyntoken NAME --help` explains a program. They are those of `python -m dyntoken.tools.NAME`; train and eval are
`python -m dyntoken.main`.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from dyntoken import schema

OF_MAIN = {
    "train": ("Train a run, or go on with it", ()),
    "eval": ("Evaluate a run or weights", ("--mode=eval",)),
}


def programs() -> dict[str, str]:
    """Name of each program and what it does in a line; read from the sources, nothing is imported."""
    found = {name: line for name, (line, _) in OF_MAIN.items()}
    for path in sorted((Path(__file__).parent / "tools").glob("*.py")):
        source = path.read_text()
        if "\nmain = cli.tool(" in source:
            text = ast.get_docstring(ast.parse(source)) or ""
            found[path.stem] = text.partition("\n")[0].rstrip(".")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a program; returns its exit status."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    known = programs()
    if name in ("-h", "--help", "help"):
        wide = max(map(len, known))
        listed = "\n".join(f"  {program:{wide}}  {line}" for program, line in known.items())
        print(f"{(__doc__ or '').strip()}\n\nprograms:\n{listed}")
        return 0
    if name == "--version":
        from dyntoken import __version__

        print(__version__)
        return 0
    if name not in known:
        close = schema.nearest(name, list(known))
        hint = f"did you mean {', '.join(close)}?" if close else "--help lists the programs"
        print(f"dyntoken: error: no program {name!r}: {hint}", file=sys.stderr)
        return 2
    if name in OF_MAIN:
        from dyntoken import main as runs

        sys.argv = [f"dyntoken {name}", *rest, *OF_MAIN[name][1]]
        runs.cli()
        return 0
    return importlib.import_module(f"dyntoken.tools.{name}").main(rest, f"dyntoken {name}")


if __name__ == "__main__":
    sys.exit(main())
