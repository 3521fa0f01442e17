"""Where the time of a compiled step goes: seconds per class of operation, from the profiler's trace.

The trace names the instructions of the compiled program, and the program's text the modules
that they come from. An instruction that fuses several layers counts where its result belongs. Several
instructions may run at once on a CPU: seconds are those of instructions, added up, not of the clock.
"""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile
from typing import Any

import jax

from dyntoken.analysis import hlo
from dyntoken.analysis.timing import Program

# By modules and named scopes, innermost rules first; what merely moves data is "copies".
CLASSES = {
    "score": r"predictor|/score",
    "select": r"reducer_\d+.*/(select|top_k|sort|argsort)",
    "squeeze": r"reducer_\d+",
    "norms": r"/(norm\w*|\w+_norm)\b",
    "attention": r"/attn\b|\.attend\b",
    "MLP": r"/mlp\b|\.feed_forward\b",
    "stem": r"patch_embed|/stem",
    "head": r"/head\b",
    "optimizer": r"/optimizer",
}
COPIES, REST = "copies", "rest"
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def split(program: Program, calls: int = 5) -> dict[str, float]:
    """Seconds of one call of a compiled program, by class, the largest first.

    Args:
      program: its `fn` is compiled (`compiling.compiled`), its arguments are arrays.

    Raises:
      ValueError: the profiler of this platform names no instructions.
    """
    classes = by_instruction(program.fn.as_text())
    jax.block_until_ready(program())
    seconds: dict[str, float] = collections.defaultdict(float)
    for name, duration in _trace(program, calls):
        if name in classes:
            seconds[classes[name]] += duration / calls
    if not seconds:
        raise ValueError(f"the profiler names no instructions on {jax.default_backend()}")
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def by_instruction(text: str) -> dict[str, str]:
    """The class of each instruction in the text of a compiled program; loops and calls have none."""
    bodies, _ = hlo.computations(text)
    found = {}
    for lines in bodies.values():
        for line in lines:
            if line.kind not in hlo.FREE:
                found[line.name] = _class(bodies, line)
    return found


def _class(bodies: Any, line: Any) -> str:
    inner = bodies.get(line.called("calls"), ())
    kinds = {one.kind for one in inner} or {line.kind}
    if kinds <= hlo.MOVES:
        return COPIES
    names = [m[1] for one in (line, *reversed(inner)) if (m := _OP_NAME.search(one.rest))]
    path = "/" + names[0] if names else ""
    return next((name for name, rule in CLASSES.items() if re.search(rule, path)), REST)


def _trace(program: Program, calls: int) -> list[tuple[str, float]]:
    """(instruction, seconds) of everything that ran."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory(prefix="dyntoken-profile-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(calls):
                jax.block_until_ready(program())
        files = [str(path) for path in pathlib.Path(folder).rglob("*.xplane.pb")]
        planes = [plane for file in files for plane in jax.profiler.ProfileData.from_file(file).planes]
        return [
            (str(dict(event.stats)["hlo_op"]), event.duration_ns * 1e-9)
            for plane in planes
            for line in plane.lines
            for event in line.events
            if not event.name.startswith("end: ") and any(key == "hlo_op" for key, _ in event.stats)
        ]
