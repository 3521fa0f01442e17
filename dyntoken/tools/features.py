"""Features of pictures: what the classifier of a model reads, one row per picture.

Writes a .npz or Parquet file with the columns `file` and `pooled`, with --tokens
also the final `tokens` [prefix + n, C], their `place` [n] and, for each patch of
the picture, its `carrier`, the row that stands for it (-1: none).

FOLDER stands for all pictures in it and in its sub-folders. A file that is no
picture is named and left out, and the exit status is then 1. What was killed
goes on where it was when the same command is given again.

examples:
  python -m dyntoken.tools.features --workdir=runs/mine photos --out=features.npz
  python -m dyntoken.tools.features --workdir=runs/mine photos --keep=0.5 --out=features.parquet
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dyntoken.tools import cli, pictures

KEPT = ("file", "pooled", "tokens", "place", "carrier")  # columns of the result


def arguments(parser: cli.Parser) -> None:
    """The options."""
    pictures.add(parser)
    parser.add_argument("--tokens", action="store_true", help="also all final tokens, with their places")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", required=True, help="features.npz or features.parquet"
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the file."""
    from dyntoken.tools import parts

    writers = {".npz": parts.write_npz, ".parquet": parts.write_parquet}
    if args.out.suffix not in writers:
        raise cli.UsageError(f"--out={args.out}: give a file that ends in {' or '.join(writers)}")
    pictures.take_run(args)
    paths = pictures.listed(args.picture)
    predictor = pictures.predictor(args, features=True, tokens=args.tokens)
    pictures.remark(paths, predictor)
    jobs = pictures.parts(paths, args.batch)
    stored = parts.Parts(args.out, pictures.plan(paths, predictor))
    make = lambda job: pictures.columns(predictor, job)  # noqa: E731

    def good() -> Any:
        for part in parts.run(jobs, make, stored):
            fine = part["error"] == ""
            yield {name: part[name][fine] for name in KEPT if name in part}

    failed, count = [], 0
    for part in pictures.watched(parts.run(jobs, make, stored), len(paths)):
        failed += pictures.failed(part)
        count += int((part["error"] == "").sum())
        width = part["pooled"].shape[1]
    stored.finish(lambda path: writers[args.out.suffix](path, good))
    return {"written": str(args.out), "pictures": count, "width": width, "failed": failed}


def report(found: dict[str, Any]) -> str:
    """One line."""
    count = cli.counted(found["pictures"], "picture")
    return f"written: {found['written']}, {count}, {cli.counted(found['width'], 'feature')} of each"


main = cli.tool(__spec__.name, __doc__, arguments, measure, report)
if __name__ == "__main__":
    sys.exit(main())
