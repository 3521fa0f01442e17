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
      body: the backbone, of which `depth`, `grid` and `prefix` are read.
      method: row of `METHODS`; options: replacements of its own fields.
      keep: keep rate or counts, see `ops.select.keep_counts`.
      at: 0-based block indices.
      form: "auto", "mask" or "gather".
      arch: what messages call the backbone.

    Raises:
      ValueError: a site outside the depth, a keep that leaves no token, or a
        method that needs the class token of a backbone without one.
    """
    at = tuple(at)
    if list(at) != sorted(set(at)) or not at or at[0] < 0 or at[-1] >= body.depth:
        raise ValueError(f"at={at} must be increasing block indices between 0 and {body.depth - 1}")
    row = reducers.method(method, **options)
    if dict(row.options).get("score") == "class_attention" and not body.prefix:
        raise ValueError(
            f"method {method!r} ranks patches by the class token, which {arch} lacks: "
            "dynamicvit and dtps work without one"
        )
    initial = body.grid[0] * body.grid[1]
    counts = select.keep_counts(keep, len(at), initial, relative=row.relative, fused=row.fused)
    sites, current = [], initial
    for index, (kept, ratio) in zip(at, counts, strict=True):
        spec = Spec.of(row.make, keep=kept, current=current, ratio=ratio, form=form, **dict(row.options))
        sites.append(Site(index, spec, row.inside))
        current = kept + int(row.fused and kept < current)
    return tuple(sites)
