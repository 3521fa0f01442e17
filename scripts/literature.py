"""Writes docs/literature.md's table from docs/literature.csv: `python scripts/literature.py`."""

from __future__ import annotations

import csv
import pathlib

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
TABLE, PAGE = DOCS / "literature.csv", DOCS / "literature.md"
START, END = "<!-- literature -->\n", "\n<!-- /literature -->"


def main() -> None:
    """Replaces the table between its marks."""
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(f"{before}{START}{markdown()}{END}{rest.partition(END)[2]}")


def markdown() -> str:
    """The rows, by method as they come, then by cost."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    order = list(dict.fromkeys(row["method"] for row in rows))
    rows.sort(key=lambda row: (order.index(row["method"]), row["model"], -float(row["GMACs"])))
    lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    return "\n".join([*lines, *(f"| {' | '.join(row.values())} |" for row in rows)])


if __name__ == "__main__":
    main()
