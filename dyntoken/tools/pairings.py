"""Which method works on which backbone, and why not: `python -m dyntoken.tools.pairings`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from dyntoken import architectures, reducers
from dyntoken.backbones import BACKBONES
from dyntoken.models import create_model
from dyntoken.tools import cli

TEXT = """\
Builds every method on every backbone and prints a Markdown table of what came of it:
"yes", "at ..." where the method has sites of its own there, or the number of the reason
below. The columns after the methods are a cascade and a model with exits by depth."""
EXAMPLES = """\
  python -m dyntoken.tools.pairings
  python -m dyntoken.tools.pairings --json"""


@cli.program
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = cli.Parser("pairings", TEXT, EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(argv)
    found = pairings()
    print(json.dumps(found) if args.json else markdown(found))
    return 0


def pairings() -> dict[str, dict[str, str]]:
    """Backbone -> prefix of a name -> "yes", "at ..." or the reason against it.

    A backbone is stood for by the first name of its family.
    """
    return {family.listed[0]: _row(family.listed[0]) for family in architectures.FAMILIES}


def _row(arch: str) -> dict[str, str]:
    known = architectures.parse(arch)
    body = BACKBONES[known.backbone](**known.options, parent=None)
    usual, pool = body.default_sites, {} if body.prefix else {"pool": "mean"}
    row = {}
    for prefix in _prefixes():
        try:
            model = create_model(f"{prefix}_{arch}", **pool)
        except ValueError as error:
            row[prefix] = f"no: {error}"
            continue
        sites = model.at if prefix in reducers.METHODS else usual
        row[prefix] = "yes" if sites == usual else f"at {', '.join(map(str, sites))}"
    return row


def _prefixes() -> tuple[str, ...]:
    return (*reducers.METHODS, architectures.CASCADE, architectures.MULTIEXIT)


def markdown(found: dict[str, dict[str, str]]) -> str:
    """The table and, below it, the reasons, each once; `create_model` adds what works instead."""
    reasons: list[str] = []
    lines = [f"| | {' | '.join(_prefixes())} |", f"|---|{'---|' * len(_prefixes())}"]
    for arch, row in found.items():
        cells = [_cell(text, reasons) for text in row.values()]
        lines.append(f"| `{arch}` | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join([*lines, "", *notes])


def _cell(text: str, reasons: list[str]) -> str:
    if not text.startswith("no: "):
        return text
    reason = text.partition("no: ")[2].partition(": ")[2].partition("; ")[0]  # without names and advice
    if reason not in reasons:
        reasons.append(reason)
    return f"no ({reasons.index(reason) + 1})"


if __name__ == "__main__":
    sys.exit(main())
