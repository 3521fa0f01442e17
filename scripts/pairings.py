"""Writes README's table of methods and backbones: `python scripts/pairings.py`.

Builds every method on every backbone: "yes", "at ..." (blocks or stages) where the method
has sites of its own there, or the number of the reason below. The columns after the methods are a
cascade and a model with exits by depth.
"""

from __future__ import annotations

import pathlib

from dyntoken import architectures, reducers
from dyntoken.backbones import BACKBONES
from dyntoken.models import create_model

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- pairings -->\n", "\n<!-- /pairings -->"


def main() -> None:
    """Replaces the table between its marks."""
    before, _, rest = README.read_text().partition(START)
    README.write_text(f"{before}{START}{markdown(pairings())}{END}{rest.partition(END)[2]}")


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
    for prefix in prefixes():
        try:
            model = create_model(f"{prefix}_{arch}", **pool)
        except ValueError as error:
            row[prefix] = f"no: {error}"
            continue
        sites = model.at if prefix in reducers.METHODS else usual
        row[prefix] = "yes" if sites == usual else _sites(sites, body.depth)
    return row


def _sites(sites: tuple[int, ...], depth: int) -> str:
    if len(sites) > 3 and sites == tuple(range(sites[0], depth)):
        return f"from {sites[0]} on" if sites[0] else "in every block"
    return f"at {', '.join(map(str, sites))}"


def prefixes() -> tuple[str, ...]:
    """First parts of a name: the methods, and the two kinds of exits."""
    return (*reducers.METHODS, architectures.CASCADE, architectures.MULTIEXIT)


def markdown(found: dict[str, dict[str, str]]) -> str:
    """The table and, below it, the reasons, each once; `create_model` adds what works instead."""
    reasons: list[str] = []
    lines = [f"| | {' | '.join(prefixes())} |", f"|---|{'---|' * len(prefixes())}"]
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
    main()
