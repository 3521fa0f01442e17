"""The reports of `tools.tpu` as text and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dyntoken.tools import cli

GIB = 2**30
MIB = 2**20
HEAD = (
    *("program", "chips", "images per chip", "GiB per chip", "collectives", "sorts", "gathers"),
    *("estimated M cycles", "of them products", "compiled in (processor time)"),
)


def text(found: Mapping[str, Any]) -> str:
    """One report as a page of tables."""
    model = dict(found["model"])
    options = ", ".join(f"{key}={value}" for key, value in sorted(model.items()) if key != "name")
    what = {"train": "training step", "eval": "evaluation step"}[found["step"]]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    head = [
        f"{model['name']} ({options}): {what} for {found['chips']} chips {found['topology']}, "
        f"{found['batch_per_chip']} images per chip"
    ]
    if found["step"] == "train":
        words = [f"losses {', '.join(found['losses'])}"]
        words += [f"teacher {found['teacher']}"] if found["teacher"] else []
        words += [f"accumulate={found['accumulate']}"] if found["accumulate"] > 1 else []
        words += [f"shard={found['shard']}"] if found["shard"] != "none" else []
        head.append("; ".join(words))
    head.append(
        f"compiled ahead of time in {found['compile_s']} s (processor time: {_seconds(found)}) by "
        f"{versions}; nothing was run"
    )
    if "refused" in found:
        parts = [f"does not fit into {found['hbm_gib']} GiB: {found['refused']}"]
    else:
        parts = [_memory(found), _operations(found), _estimate(found)]
    return "\n\n".join(["\n".join(head), *parts])


def _memory(found: Mapping[str, Any]) -> str:
    memory, limit = found["memory"], found["hbm_gib"]
    parts = {"arguments and results": "held", "temporary": "temporary", "program": "code", "total": "total"}
    rows = [["memory per chip", "MiB"], *([name, f"{memory[key] / MIB:.1f}"] for name, key in parts.items())]
    return f"{cli.table(rows)}\n{100 * memory['total'] / GIB / limit:.0f} % of the chip's {limit} GiB"


def _operations(found: Mapping[str, Any]) -> str:
    rows = [["collective", "runs", "bytes per chip"]]
    rows += [[c["kind"], str(c["count"]), _size(c["bytes"])] for c in found["collectives"]]
    copies = found["copies"]
    return (
        f"{cli.table(rows) if found['collectives'] else 'collectives: none'}\n\n"
        f"sorts {found['sorts']}, gathers {found['gathers']}, scatters {found['scatters']}, "
        f"copies and transposes {copies['count']} ({copies['bytes'] / MIB:.1f} MiB)"
    )


def _estimate(found: Mapping[str, Any]) -> str:
    costs, whole = found["estimate"], _cycles(found)
    if not whole:
        return "no estimate: only a TPU's compiler writes one"
    rows = [["the compiler's estimate (not a measurement)", "runs", "with estimate", "M cycles", "share"]]
    for cost in costs:
        cells = [str(cost["count"]), str(cost["estimated"]), f"{cost['cycles'] / 1e6:.2f}"]
        rows.append([cost["group"], *cells, f"{100 * cost['cycles'] / whole:.1f} %"])
    lines = cli.table([*rows, ["all", "", "", f"{whole / 1e6:.2f}", ""]])
    loops = found["unknown_loops"]
    return f"{lines}\n{loops} loops of unknown length count as one round" if loops else lines


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Stored reports as a Markdown table, one row each."""
    rows = [HEAD, *map(_row, reports)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(HEAD) + "|", *lines[1:]])


def _row(found: Mapping[str, Any]) -> list[str]:
    model = dict(found["model"])
    options = [
        key if value is True else f"{key}={value}" for key, value in sorted(model.items()) if key != "name"
    ]
    options += ["teacher"] if found["teacher"] else []
    row = [f"`{model['name']}` {found['step']}, {', '.join(options)}", found["topology"]]
    row += [str(found["batch_per_chip"])]
    if "refused" in found:
        return [*row, f"more than {found['hbm_gib']}", *["-"] * 5, _seconds(found)]
    collectives = [f"{c['count']} x {_size(c['bytes'] // c['count'])}" for c in found["collectives"]]
    products = sum(cost["cycles"] for cost in found["estimate"] if cost["group"].startswith("matrix"))
    return [
        *row,
        f"{found['memory']['total'] / GIB:.2f} of {found['hbm_gib']}",
        ", ".join(collectives) or "none",
        str(found["sorts"]),
        str(found["gathers"]),
        f"{_cycles(found) / 1e6:.1f}",
        f"{100 * products / max(_cycles(found), 1):.0f} %",
        _seconds(found),
    ]


def _cycles(found: Mapping[str, Any]) -> int:
    return sum(cost["cycles"] for cost in found["estimate"])


def _size(count: int) -> str:
    return f"{count / MIB:.2f} MiB" if count >= MIB else f"{count} B"


def _seconds(found: Mapping[str, Any]) -> str:
    known = found["compile_cpu_s"]
    return "not recorded" if known is None else f"{known:.0f} s"
