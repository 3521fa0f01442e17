"""Writes docs/speed.md's table from results/speed.csv: `python scripts/speed_table.py`."""

from __future__ import annotations

import pathlib

from dyntoken.tools import bench_suite

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    """Replaces the table between its marks."""
    page = ROOT / "docs" / "speed.md"
    before, _, rest = page.read_text().partition(bench_suite.START)
    table = bench_suite.markdown(bench_suite.read(ROOT / "results" / "speed.csv"))
    page.write_text(
        f"{before}{bench_suite.START}{table}{bench_suite.END}{rest.partition(bench_suite.END)[2]}"
    )


if __name__ == "__main__":
    main()
