"""Position embeddings of another grid: kind `pos_embed_resize`."""

from __future__ import annotations

import re

from dyntoken.weights import pos_embed
from tests.golden.case import Case
from tests.golden.ledger import Ledger

_NAME = re.compile(r"(\d+)(?:x(\d+))?to(\d+)(?:x(\d+))?\.(bicubic|bilinear)")


def check(case: Case, ledger: Ledger) -> None:
    """Every recorded resize; one class row is copied."""
    for name in case.named("output"):
        found = _NAME.fullmatch(name)
        if not found:
            ledger.fail(f"{name}: not understood")
            continue
        rows, columns, new_rows, new_columns, method = found.groups()
        source = ledger.expected(f"{name.rpartition('.')[0]}.in")
        ours = pos_embed.fit(
            source,
            prefix=1,
            grid=(int(new_rows), int(new_columns or new_rows)),
            source_prefix=1,
            source_grid=(int(rows), int(columns or rows)),
            method=method,
            origin=name,
        )
        ledger.close(name, ours)
