"""ToMe: kinds `tome_deit` and `tome_deit_distilled`, and the primitives of its merging (`unit.*`)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from dyntoken.ops import merge, select
from tests.golden.case import Case
from tests.golden.checkers import common, merging
from tests.golden.ledger import Ledger


def check(case: Case, ledger: Ledger) -> None:
    """Every recorded run, and the primitives if they are recorded."""
    for name, run in case.info["runs"].items():
        _check_run(case, ledger, name, run)
    for name in sorted({name.split(".")[1] for name in ledger.names("unit.") if name.count(".") == 2}):
        _check_unit(ledger, name)


def _check_run(case: Case, ledger: Ledger, name: str, run: dict[str, Any]) -> None:
    r = tuple(run["r"]) if isinstance(run["r"], list) else run["r"]
    built = merging.build(case, "tome", r=r, proportional=run["prop_attn"])
    sites = built.model.sites()
    ledger.same(f"{name} sites", [site.at for site in sites], list(range(built.model.plain().depth)))
    out, seen = merging.evaluate(built, common.nhwc(ledger.expected("input.images")))
    prefix = out.tokens.prefix
    counts = [prefix + reduction.count for reduction in out.reductions]
    ledger.equal(f"{name} tokens_after_block (case.json)", counts, run["tokens_after_block"])
    ledger.close(f"{name}.logits", out.logits)
    for block, rows in enumerate(out.records["blocks"]):
        carrier = out.reductions[block].carrier
        sizes = np.asarray(select.sizes(jnp.asarray(carrier), rows.shape[1] - prefix))
        ledger.offer(f"{name}.block{block}.out", rows)
        ledger.offer(f"{name}.block{block}.size", merging.with_prefix(sizes, prefix, 1.0))
        if ledger.holds(f"{name}.block{block}.metric"):
            ledger.close(f"{name}.block{block}.metric", seen[block].keys.mean(axis=1))
    ledger.equal(f"{name}.source", merging.source(out.tokens.carrier, out.tokens.count, prefix))
    ledger.close(f"{name}.size", merging.with_prefix(out.tokens.size, prefix, 1.0))


def _check_unit(ledger: Ledger, name: str) -> None:
    """One matching of 17 rows with no, one or two protected rows."""
    prefix = {"plain": 0, "cls": 1, "cls_dist": 2}[name]
    metric, x, size = (jnp.asarray(ledger.expected(f"unit.{part}")) for part in ("metric", "x", "size"))
    stem, n = f"unit.{name}.", metric.shape[1] - prefix
    r = n + prefix - ledger.expected(f"{stem}source").shape[1]
    # Without a class token the official code leaves its sources in the order of their similarity.
    found = merge.bipartite(metric[:, prefix:], *merge.halves(n, prefix), r, ascending=prefix > 0)
    mean = jnp.concatenate([x[:, :prefix], merge.mean(x[:, prefix:], found)], axis=1)
    weighted = jnp.concatenate([x[:, :prefix], merge.mean(x[:, prefix:], found, size[:, prefix:])], axis=1)
    total = jnp.einsum("bnk,bn->bk", jnp.eye(n - r)[found.remap], size[:, prefix:])
    rows = select.shift_past_prefix(found.remap, prefix)
    ledger.close(f"{stem}merge_mean", mean)
    ledger.close(f"{stem}merge_wavg", weighted)
    ledger.close(f"{stem}merge_wavg_size", jnp.concatenate([size[:, :prefix], total], axis=1))
    ledger.equal(f"{stem}source", merging.source(np.asarray(found.remap), n - r, prefix))
    ledger.offer(f"{stem}unmerge", select.take(mean, rows))
