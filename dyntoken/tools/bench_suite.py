"""The suite of bench: what results/speed.csv holds, its table and its picture."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import pathlib
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dyntoken.tools import bench_peers

DENSE = "deit_small_patch16_224"
METHODS = ("dynamicvit", "dtps", "evit", "etps")
POINTS = ("--keep=0.7 --at=3,6,9", "--keep=0.5 --at=3,6,9", "--keep=0.5 --at=2,4,6,8")
COMMANDS = (
    f"{DENSE} --batch=1,16,64 --vs-torch --vs-onnx --vs-openvino --compile",
    f"{DENSE} --batch=16,32 --train --vs-torch",
    *(f"{method}_{DENSE} {point} --batch=1,16,64" for method in METHODS for point in POINTS),
    f"dtps_{DENSE} --keep=0.7 --at=3,6,9 --batch=16 --compile --vs-onnx --vs-openvino",
    f"dtps_{DENSE} --batch=16 --train",
    f"etps_{DENSE} --keep=0.5 --at=3,6,9 --batch=16 --train",
)
PACKAGES = ("dyntoken", "jax", "jaxlib", "torch", "onnxruntime", "openvino")
COLUMNS = (
    *("mode", "model", "options", "by", "dtype", "batch", "images_per_s", "latency_ms", "p90_ms", "p99_ms"),
    *("speed_up", "gmacs", "share_of_ideal", "first_compile_s", "cached_compile_s", "planned_gib", "pairs"),
    *("command", "machine", "versions"),
)
SHOWN = (
    "mode",
    "model",
    "options",
    "by",
    "batch",
    "images_per_s",
    "latency_ms",
    "speed_up",
    "share_of_ideal",
)
START, END = "<!-- speed -->\n", "\n<!-- /speed -->"  # around the table in docs/speed.md
NOT_YET = "Not yet run."
Row = dict[str, str]


def arguments(group: Any) -> None:
    """The options."""
    group.add_argument(
        "--suite",
        nargs="?",
        const="results",
        metavar="FOLDER",
        help="time DeiT-S beside other runtimes, and four methods; writes speed.csv and speed.png (results)",
    )
    group.add_argument("--only", metavar="TEXT", help="of the suite, the commands that contain it")


def run(
    args: argparse.Namespace,
    parse: Callable[[list[str]], argparse.Namespace],
    measure: Callable[[argparse.Namespace, int], dict[str, Any]],
) -> dict[str, Any]:
    """Runs the commands one by one; after each the files hold what there is so far.

    Raises:
      ValueError: --only leaves none.
    """
    commands = [command for command in COMMANDS if (args.only or "") in command]
    if not commands:
        raise ValueError(f"no command of the suite contains {args.only!r}")
    asked = [parse(shlex.split(command)) for command in commands]
    for one in asked:
        bench_peers.check_all(one)
    folder, rows = pathlib.Path(args.suite), []
    folder.mkdir(parents=True, exist_ok=True)
    for command, one in zip(commands, asked, strict=True):
        for batch in one.batch:
            rows += table_rows(command, measure(one, batch), args.pairs)
            write(folder / "speed.csv", rows)
    plot(folder / "speed.png", rows)
    return {"suite": str(folder), "rows": rows}


def table_rows(command: str, found: Mapping[str, Any], pairs: int) -> list[Row]:
    """The rows of one result of bench."""
    words = shlex.split(command)
    options = " ".join(word.lstrip("-") for word in words if word.startswith(("--keep", "--at")))
    mode = {"eval": "evaluation", "train": "training"}[found["mode"]]
    rows = []
    for row in found["models"]:
        ours = row["runtime"] == "jax"
        last = ours and row is not found["models"][0]
        tail = row["latency_percentiles_ms"]
        values = {
            "mode": mode,
            "model": row["name"],
            "options": options if row["name"] == words[0] else "",
            "by": row["runtime"],
            "dtype": found["dtype"],
            "batch": found["batch"],
            "images_per_s": f"{row['images_per_s']:.2f}",
            "latency_ms": f"{row['latency_ms']:.2f}",
            "p90_ms": f"{tail['p90']:.2f}",
            "p99_ms": f"{tail['p99']:.2f}",
            "speed_up": f"{row['speed_up']:.3f}",
            "gmacs": f"{row['gmacs']:.4g}",
            "share_of_ideal": _number(found.get("share_of_ideal") if last else None, 1),
            "first_compile_s": _number(row.get("first_compile_s"), 1),
            "cached_compile_s": _number(row.get("cached_compile_s"), 1),
            "planned_gib": _number(row.get("planned_bytes"), 2**-30),
            "pairs": pairs,
            "command": f"python -m dyntoken.tools.bench {command} --pairs={pairs}",
            "machine": f"{found['device']}, {machine()}",
            "versions": versions(),
        }
        rows.append({key: str(value) for key, value in values.items()})
    return rows


def _number(value: float | None, scale: float) -> str:
    return "" if value is None else f"{scale * value:.3f}"


def machine() -> str:
    """Processor and number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def versions() -> str:
    """Of what there is of `PACKAGES`."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """The rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def read(path: pathlib.Path) -> list[Row]:
    """The rows of `write`."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows: Sequence[Row]) -> str:
    """The table for people, without the dense rows that others are compared with."""
    shown = [r for r in rows if f" {DENSE} " in r["command"] or (r["model"], r["by"]) != (DENSE, "jax")]
    machines = list(dict.fromkeys(f"{row['machine']}; {row['versions']}" for row in rows))
    lines = [f"| {' | '.join((*SHOWN, 'measured on')).replace('_', ' ')} |", "|---" * (len(SHOWN) + 1) + "|"]
    for row in shown:
        number = 1 + machines.index(f"{row['machine']}; {row['versions']}")
        lines.append(f"| {' | '.join(row[name] for name in SHOWN)} | {number} |")
    return "\n".join([*lines, "", *(f"{number}. {one}." for number, one in enumerate(machines, start=1))])


def plot(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """The dense model's speed in other runtimes, in the runs that time them; speed-up of methods by multiply-adds."""
    from dyntoken.analysis import figures

    figure = figures.figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    figures.curves(left, "batch", "dense, times as fast as XLA's program")
    figures.curves(right, "multiply-adds, times fewer", "speed-up")
    # Of one run on one machine alone: the speed of a shared machine is another in the next one.
    timed = [r for r in rows if r["mode"] == "evaluation"]
    dense = [r for r in timed if f" {DENSE} " in r["command"] and r["machine"] == rows[0]["machine"]]
    for colour, by in zip(figures.COLOURS, dict.fromkeys(row["by"] for row in dense), strict=False):
        points = {int(row["batch"]): float(row["speed_up"]) for row in dense if row["by"] == by}
        left.plot(*zip(*sorted(points.items()), strict=True), "o-", color=colour, label=by)
    left.set_xscale("log")
    left.set_xticks(sorted({int(row["batch"]) for row in dense}), minor=False)
    left.minorticks_off()
    left.xaxis.set_major_formatter("{x:g}")
    whole = max((float(row["gmacs"]) for row in dense), default=1.0)
    reduced = [r for r in timed if r["model"] != DENSE and r["by"] == "jax" and " --vs-" not in r["command"]]
    for colour, batch in zip(figures.COLOURS, sorted({int(row["batch"]) for row in reduced}), strict=False):
        points = [
            (whole / float(r["gmacs"]), float(r["speed_up"])) for r in reduced if int(r["batch"]) == batch
        ]
        right.plot(*zip(*sorted(points), strict=True), "o", color=colour, label=f"batch {batch}")
    right.axline((1, 1), slope=1, color=figures.GRID)
    for axis in (left, right):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figures.save(figure, path)


def report(found: Mapping[str, Any]) -> str:
    """The table, and where the files are."""
    return f"{markdown(found['rows'])}\n\nwritten: {found['suite']}/speed.csv and speed.png"
