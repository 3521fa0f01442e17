"""Compares the library with recorded runs of the official code.

    python -m tests.golden [-v] DIR...

DIR is a case folder or a folder of cases. Exit status: 0 all PASS, 1 a case
failed or its kind is not built yet (or a part of it: what there is agrees, the
rest is listed), 2 an argument that is no case.
"""

from __future__ import annotations

import argparse
import sys

from tests.golden.case import CaseError, find
from tests.golden.check import FAIL, PASS, UNSUPPORTED, check


def main(arguments: list[str] | None = None) -> int:
    """Runs the checker; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden",
        description="Compare the library with recorded runs of the official code.",
    )
    parser.add_argument("paths", nargs="+", metavar="DIR", help="a case folder, or a folder of cases")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every array")
    options = parser.parse_args(arguments)
    folders, notes, errors = find(options.paths)
    for note in notes:
        print(f"note: {note}")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        return 2
    statuses = []
    for folder in folders:
        try:
            result = check(folder, options.verbose)
        except CaseError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print("\n".join(result.lines), flush=True)
        statuses.append(result.status)
    counts = {status: statuses.count(status) for status in (PASS, FAIL, UNSUPPORTED)}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 0 if statuses and counts[PASS] == len(statuses) else 1


if __name__ == "__main__":
    sys.exit(main())
