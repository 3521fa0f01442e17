"""From `keep` and `at` to the reduction sites of one backbone, with their static counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dyntoken import reducers
from dyntoken.nn.trunk import Site, Spec
from dyntoken.ops import select


def make_sites(
    body: Any,
    method: str,
    options: Mapping[str, Any],
    *,
    keep: Any,
    at: Sequence[int],
    form: str,
    arch: str,
) -> tuple[Site, ...]:
    """The sites of a method in a backbone.

    Args:
      body: the backbone: `depth`, and the answers of `nn.reduction_sites.ReductionSites`.
      method: row of `METHODS`; options: replacements of its own fields.
      keep: keep rate or counts, see `ops.select.keep_counts`.
      at: 0-based positions, of blocks or (hierarchical) as the backbone says.
      form: "auto", "mask" or "gather".
      arch: what messages call the backbone.

    Raises:
      ValueError: a site outside the depth, a keep that leaves no token, or a
        method that the backbone refuses.
    """
    at = tuple(at)
    if list(at) != sorted(set(at)) or not at or at[0] < 0 or at[-1] >= body.depth:
        raise ValueError(
            f"at={at} must be increasing {body.site_noun} indices between 0 and {body.depth - 1}"
        )
    row = reducers.method(method, **options)
    _check_pairing(body, method, row, at, arch)
    sites = []
    for index, (current, kept, ratio) in zip(at, _counts(body, row, keep, at), strict=True):
        spec = Spec.of(row.make, keep=kept, current=current, ratio=ratio, form=form, **dict(row.options))
        sites.append(Site(index, spec, row.inside))
    return tuple(sites)


def refusal(body: Any, row: reducers.Method, at: tuple[int, ...] | None = None) -> str | None:
    """Why a backbone refuses a method, or None if it takes it; at its default sites unless given."""
    return body.refuse(row.plain, default_sites(body, row) if at is None else at)


def default_sites(body: Any, row: reducers.Method) -> tuple[int, ...]:
    """Where a method reduces in a backbone unless told otherwise."""
    return body.sites_of(row.plain)


def _check_pairing(body: Any, method: str, row: reducers.Method, at: tuple[int, ...], arch: str) -> None:
    reason = refusal(body, row, at)
    if reason is None:
        return
    working = [name for name in reducers.METHODS if refusal(body, reducers.METHODS[name], at) is None]
    verb = "works" if len(working) == 1 else "work"
    instead = f"{', '.join(working)} {verb} there" if working else "no method works there"
    raise ValueError(f"method {method!r} at {at} makes no sense in {arch}: {reason}; {instead}")


def _counts(
    body: Any, row: reducers.Method, keep: Any, at: tuple[int, ...]
) -> tuple[tuple[int, int, float], ...]:
    """Per site: rows before it, rows that stay, target ratio."""
    rule = {"relative": row.relative, "fused": row.plain.adds_row}
    keep = body.site_rates(keep, len(at)) if isinstance(keep, float) else keep
    cells = [rows * columns for rows, columns in map(body.site_grid, at)]
    if not body.nested:
        rates = select.expand(keep, len(at), relative=True)
        alone = [select.keep_counts((rate,), 1, n, **rule)[0] for rate, n in zip(rates, cells, strict=True)]
        return tuple((n, *count) for n, count in zip(cells, alone, strict=True))
    found, current = [], cells[0]
    for kept, ratio in select.keep_counts(keep, len(at), cells[0], **rule):
        found.append((current, kept, ratio))
        current = kept + int(row.plain.adds_row and kept < current)
    return tuple(found)
