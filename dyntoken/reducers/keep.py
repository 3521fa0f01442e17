"""How much to keep: a rate or counts, as a static count per site, and EViT's schedule of rates."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from typing import Any


def site_counts(
    body: Any, reducer: Any, keep: Any, at: tuple[int, ...], *, relative: bool, round_to: int | None = None
) -> tuple[tuple[int, int, float], ...]:
    """Per site of a backbone: rows before it, rows that stay, target ratio.

    Args:
      body: the backbone, see `nn.reduction_sites.ReductionSites`.
      reducer: what the method declares.
      keep, relative, round_to: see `keep_counts`.
      at: positions of the sites.
    """
    options = {"relative": relative, "round_to": round_to}
    fused = reducer.adds_row
    keep = body.site_rates(keep, len(at)) if isinstance(keep, float) else keep
    cells = [rows * columns for rows, columns in map(body.site_grid, at)]
    if reducer.returns or not body.nested:
        rates = per_site(keep, len(at), relative=True)
        return tuple(
            (n, *keep_counts((rate,), 1, n, fused=fused, prefix=body.site_prefix(site), **options)[0])
            for rate, n, site in zip(rates, cells, at, strict=True)
        )
    if reducer.pools:
        keep = pooled_counts(body.site_grid(at[0]), len(at), reducer.pools)
    keep = reducer.site_keep(keep, len(at), cells[0], body.prefix)
    protects = reducer.protects
    counts, current, extra = [], cells[0], 0
    options |= {"fused": fused, "protects": protects, "prefix": body.prefix}
    for kept, ratio in keep_counts(keep, len(at), cells[0], **options):
        counts.append((current + extra, kept + extra, ratio))
        added = int(fused and kept < current)
        current, extra = (kept, extra + added) if protects else (kept + added, 0)
    return tuple(counts)


def pooled_counts(grid: tuple[int, int], sites: int, pools: int) -> tuple[int, ...]:
    """Rows that each of so many sites leaves of a grid."""
    counts = []
    for _ in range(sites):
        grid = (-(-grid[0] // pools), -(-grid[1] // pools))
        counts.append(grid[0] * grid[1])
    return tuple(counts)


def keep_counts(
    keep: float | int | Sequence[float | int],
    sites: int,
    initial: int,
    *,
    relative: bool,
    fused: bool = False,
    protects: bool = False,
    round_to: int | None = None,
    prefix: int = 0,
) -> tuple[tuple[int, float], ...]:
    """Expands a keep rate into a static (count, target ratio) per site.

    Args:
      keep: one rate r in (0, 1), or one entry per site; floats are rates (1.0
        keeps all), ints are counts.
      sites: number of reduction sites.
      initial: first patch count N0.
      relative: False reads rates against the first patch count and rounds down,
        `int(N0 * r)`, r expanding to r, r^2, r^3 (DynamicViT, TPS); True
        against the current tokens and rounds up, `ceil(r * n)` (EViT, eTPS).
      fused: each site that drops adds one fused token, which later counts include.
      protects: later sites keep it besides their count.
      round_to: of a site that drops, all rows behind it (prefix, kept and fused) are the nearest
        multiple of this number that keeps at least one token, the larger of two equally near; the
        target ratio is that of the rounded count. None: counts stay as they are.
      prefix: rows that are no patches, for `round_to`.

    Raises:
      ValueError: no entry per site, a rate outside (0, 1], a count outside
        1..current, or no multiple of `round_to` there.
    """
    rates = per_site(keep, sites, relative=relative)
    counts, current, beside = [], initial, prefix
    for site, rate in enumerate(rates):
        if isinstance(rate, int):
            count, ratio = rate, rate / initial
        else:
            if not 0.0 < rate <= 1.0:
                raise ValueError(
                    f"keep rate {rate} of site {site} is not in (0, 1]; counts are given as ints"
                )
            count = math.ceil(rate * current) if relative else int(initial * rate)
            ratio = count / initial if relative else rate
        count = min(count, current) if round_to else count
        if not 1 <= count <= current:
            raise ValueError(
                f"keep={keep} leaves {count} of {current} tokens at site {site} (first patch count "
                f"{initial}); choose between 1 and {current}"
            )
        if round_to and count < current:
            count = _rounded(count, current, round_to, beside, int(fused))
            ratio = count / initial
        counts.append((count, ratio))
        added = int(fused and count < current)
        current, beside = (count, beside + added) if protects else (count + added, beside)
    return tuple(counts)


def _rounded(count: int, current: int, multiple: int, beside: int, added: int) -> int:
    """The count near `count` with which all rows (`beside` and `added` included) are a multiple."""
    able = [total - beside - added for total in range(multiple, beside + current + added, multiple)]
    able = [n for n in able if 1 <= n < current]
    able += [current] if (beside + current) % multiple == 0 else []  # nothing leaves, nothing is added
    if not able:
        raise ValueError(
            f"keep_round_to={multiple}: no multiple of it keeps between 1 and {current} tokens beside "
            f"{beside + added} others; choose a smaller one"
        )
    return min(able, key=lambda n: (abs(n - count), -n))


def per_site(
    keep: float | int | Sequence[float | int], sites: int, *, relative: bool
) -> tuple[float | int, ...]:
    """One entry per site of what `keep_counts` takes.

    Raises:
      ValueError: not a number, nor a sequence with an entry per site.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float, Sequence)) or isinstance(keep, str):
        raise ValueError(f"keep must be a number or a sequence of numbers, got {keep!r}")
    if isinstance(keep, Sequence):
        if len(keep) != sites:
            raise ValueError(f"keep={tuple(keep)} has {len(keep)} entries for {sites} sites (at=...)")
        return tuple(keep)
    if isinstance(keep, int) or relative:
        return (keep,) * sites
    return tuple(keep ** (site + 1) for site in range(sites))


def keep_rate_schedule(
    step: int, *, base: float, steps_per_epoch: int, warmup_epochs: int, total_epochs: int
) -> float:
    """EViT's keep rate at a step: 1 at first, then a cosine down to `base`.

    youweiliang/evit, `adjust_keep_rate`. A keep rate fixes shapes, so the step is
    a Python int; `quantize_keep_rates` bounds the number of compilations.

    Args:
      step: training step, from 0.
      base: final keep rate, in (0, 1].
      warmup_epochs: epochs at rate 1 (`shrink_start_epoch`).
      total_epochs: first epoch at `base` (`shrink_start_epoch + shrink_epochs`).
    """
    _check_schedule(base, steps_per_epoch, warmup_epochs, total_epochs)
    epoch = step // steps_per_epoch
    if epoch < warmup_epochs:
        return 1.0
    if epoch >= total_epochs:
        return float(base)
    done = (step - warmup_epochs * steps_per_epoch) / ((total_epochs - warmup_epochs) * steps_per_epoch)
    return base + (1.0 - base) * 0.5 * (math.cos(math.pi * done) + 1.0)


def quantize_keep_rates(
    *, base: float, steps_per_epoch: int, warmup_epochs: int, total_epochs: int, levels: int = 5
) -> list[tuple[int, float]]:
    """`keep_rate_schedule` rounded to a few rates, one compilation each.

    The rates are evenly spaced from 1 to `base`; at each step the one nearest
    to the exact schedule holds, so it is off by at most
    `(1 - base) / (levels - 1) / 2`.

    Args:
      base, steps_per_epoch, warmup_epochs, total_epochs: see `keep_rate_schedule`.
      levels: number of rates, 1 and `base` included; at least 2.

    Returns:
      `[(first_step, rate), ...]`, steps ascending from 0, rates descending; the
      last rate is `base` exactly.
    """
    _check_schedule(base, steps_per_epoch, warmup_epochs, total_epochs)
    if levels < 2:
        raise ValueError(f"levels={levels} must be at least 2: the first rate is 1, the last {base}")
    if base == 1:
        return [(0, 1.0)]
    end = total_epochs * steps_per_epoch

    rate_at = functools.partial(
        keep_rate_schedule,
        base=base,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=warmup_epochs,
        total_epochs=total_epochs,
    )
    gap = (1.0 - base) / (levels - 1)
    first = {0: 1.0}
    for level in range(1, levels):
        rate = float(base) if level == levels - 1 else round(1.0 - level * gap, 10)
        first[bisect.bisect_left(range(end), -(rate + gap / 2), key=lambda step: -rate_at(step))] = rate
    return list(first.items())


def _check_schedule(base: float, steps_per_epoch: int, warmup_epochs: int, total_epochs: int) -> None:
    if not 0 < base <= 1:
        raise ValueError(f"the base keep rate must lie in (0, 1], not {base}")
    if steps_per_epoch < 1 or not 0 <= warmup_epochs <= total_epochs:
        raise ValueError(
            f"steps_per_epoch={steps_per_epoch} must be at least 1 and 0 <= warmup_epochs={warmup_epochs} "
            f"<= total_epochs={total_epochs}"
        )
