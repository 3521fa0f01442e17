"""A study's results as CSV, Markdown and a picture: mean and spread over seeds, ties called ties."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dyntoken.analysis import figures
from dyntoken.studies.trial import Study

SAME_COST = 1.25  # dearest by cheapest row of a series that is no line over the cost
FIRST = ("study", "row", "series", "group", "seed")


@dataclasses.dataclass(frozen=True)
class Summary:
    """A row over its seeds.

    Attributes:
      top1: of each seed, fractions.
      others: means of the other values.
      gap: mean top-1 minus the dense model's, in points.
      expected: the guess of that, None where there was none.
    """

    name: str
    series: str
    group: str
    top1: tuple[float, ...]
    others: Mapping[str, float]
    gap: float
    expected: float | None

    mean = property(lambda self: statistics.fmean(self.top1))

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, None of a single one."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None


def summarize(study: Study, stored: Sequence[Mapping[str, Any]], dense: float) -> list[Summary]:
    """One summary per row, in the order in which the study has them."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for network in stored:
        for row in network["rows"]:
            rows.setdefault(row["name"], []).append(row)
    found = []
    for name, of_seeds in rows.items():
        top1 = tuple(row["values"]["top1"] for row in of_seeds)
        others = {
            key: statistics.fmean(row["values"][key] for row in of_seeds)
            for key in of_seeds[0]["values"]
            if key != "top1"
        }
        gap = 100 * (statistics.fmean(top1) - dense)
        first = of_seeds[0]
        found.append(
            Summary(name, first["series"], first["group"], top1, others, gap, study.expected.get(name))
        )
    return sorted(found, key=lambda one: one.group)  # within a group as they came


def standing(one: Summary, rows: Sequence[Summary]) -> str:
    """How a row does in its group: "best", "tie" with the best, or points behind it."""
    peers = [row for row in rows if row.group == one.group]
    best = max(peers, key=lambda row: row.mean)
    if len(peers) < 2:
        return ""
    if one is best:
        return "best"
    behind = best.mean - one.mean
    if one.spread is None or best.spread is None:
        return f"{-100 * behind:+.2f}, spread unknown"
    spread = (one.spread**2 + best.spread**2) ** 0.5
    return "tie" if behind <= spread else f"{-100 * behind:+.2f}"


def markdown(name: str, study: Study, rows: Sequence[Summary], facts: Mapping[str, str]) -> str:
    """The table, and above it what it is of."""
    more = [key for key in dict.fromkeys(k for row in rows for k in row.others) if key != "gmacs"]
    head = ["row", "GMACs", "top-1", "spread", "seeds", *more, "to dense", "expected", "in its group"]
    lines = [f"# {name}: {study.title}", "", f"Expected before the first run: {study.expects}", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        spread = "" if row.spread is None else f"{100 * row.spread:.2f}"
        cells = [row.name, f"{row.others['gmacs']:.3f}", f"{100 * row.mean:.2f}", spread, str(len(row.top1))]
        cells += [f"{100 * row.others[key]:.1f} %" if key in row.others else "" for key in more]
        guess = "" if row.expected is None else f"{row.expected:+.1f}"
        cells += [f"{row.gap:+.2f}", guess, standing(row, rows)]
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        "top-1 in %, mean over the seeds; spread: their standard deviation; to dense, expected: points from the "
        "dense weights as they are; a difference to the best of its group within the spread of the two is a tie."
    )
    return "\n".join([*lines, "", note, ""])


def as_csv(name: str, study: Study, stored: Sequence[Mapping[str, Any]]) -> str:
    """One line per row and seed."""
    keys = list(dict.fromkeys(key for network in stored for row in network["rows"] for key in row["values"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIRST, *keys, "expected", "seconds"])
    for network in stored:
        for row in network["rows"]:
            values = [f"{row['values'][key]:.6g}" if key in row["values"] else "" for key in keys]
            place = [name, row["name"], row["series"], row["group"], network["seed"]]
            writer.writerow([*place, *values, study.expected.get(row["name"], ""), network["seconds"]])
    return text.getvalue()


def draw(study: Study, rows: Sequence[Summary], dense: tuple[float, float]) -> Any:
    """Top-1 over multiply-adds, a line per series, or the rows below each other.

    That is where no line has a direction: series of one point, or of points of one cost.

    Args:
      dense: its cost and its top-1.
    """
    series: dict[str, list[Summary]] = {}
    for row in rows:
        series.setdefault(row.series, []).append(row)
    costs = [[row.others["gmacs"] for row in points] for points in series.values()]
    if all(max(each) < SAME_COST * min(each) for each in costs):
        return _draw_rows(study, rows, dense[1])
    figure = figures.figure(7.0, max(4.4, 1.2 + 0.16 * len(series)))
    axis = figure.add_subplot()
    axis.axhline(100 * dense[1], color=figures.FRAME, linewidth=0.8, linestyle="--", label="dense")
    styles = ("o-", "s--", "^:", "d-.")
    for number, (name, points) in enumerate(series.items()):
        points = sorted(points, key=lambda row: row.others["gmacs"])
        colour = figures.COLOURS[number % len(figures.COLOURS)]
        style = styles[number // len(figures.COLOURS) % len(styles)]
        x, y = [p.others["gmacs"] for p in points], [100 * p.mean for p in points]
        errors = [100 * (p.spread or 0.0) for p in points]
        axis.errorbar(
            x, y, yerr=errors, fmt=style, color=colour, markersize=4, linewidth=1.1, capsize=2, label=name
        )
    figures.curves(axis, "GMACs of an image", "top-1 (%)")
    axis.set_title(study.title, fontsize=9)
    figure.legend(fontsize=6, frameon=False, loc="outside right upper")
    return figure


def _draw_rows(study: Study, rows: Sequence[Summary], dense: float) -> Any:
    """Top-1 of each row, groups in colours of their own."""
    figure = figures.figure(7.0, 1.2 + 0.2 * len(rows))
    axis = figure.add_subplot()
    axis.axvline(100 * dense, color=figures.FRAME, linewidth=0.8, linestyle="--")
    groups = list(dict.fromkeys(row.group for row in rows))
    for place, row in enumerate(rows):
        colour = figures.COLOURS[groups.index(row.group) % len(figures.COLOURS)]
        error = 100 * (row.spread or 0.0)
        axis.errorbar(100 * row.mean, place, xerr=error, fmt="o", color=colour, markersize=5, capsize=2)
    axis.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    axis.invert_yaxis()
    figures.curves(axis, "top-1 (%), dashed: dense", "")
    axis.set_title(study.title, fontsize=9)
    return figure
