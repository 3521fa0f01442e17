"""Live lines on a terminal: how far something is, how fast it goes and how long it will still take.

Where stderr is no terminal nothing is written here: a log has the plain lines that programs print anyway.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
FORM = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}{pace}{postfix}"
TICK_S = 0.5


def bar(what: str, total: int, *, unit: str = "", start: int = 0) -> Any:
    """A bar of tqdm's, on stderr: `update(n)`, `set_postfix_str(text)`, `close()`; silent without a terminal.

    Args:
      what: is done.
      total: how many of them there are.
      unit: what they are, in the plural.
      start: how many are done already.
    """
    import tqdm

    class Bar(tqdm.tqdm):
        """Says nothing of the pace until it has one."""

        @property
        def format_dict(self) -> Any:
            known = super().format_dict
            done = known["n"] - (known.get("initial") or 0)
            rate = known.get("rate") or (done / known["elapsed"] if known["elapsed"] else 0)
            left = tqdm.tqdm.format_interval((total - known["n"]) / rate) if rate else ""
            return {**known, "pace": f"  ETA {left}  {speed(rate, unit)}" if rate else ""}

    # To a terminal that tells no size (a fresh pty, some containers) tqdm would write nothing.
    width = (
        {"dynamic_ncols": True} if shutil.get_terminal_size((0, 0)).columns else {"ncols": 80, "nrows": 24}
    )
    options = {"unit": unit, "initial": start, "bar_format": FORM, "leave": False, **width}
    return Bar(desc=what, total=total, disable=None, file=sys.stderr, **options)


def speed(rate: float, unit: str) -> str:
    """`4.2 steps/s`, below one `24.5 s/step`.

    Args:
      rate: per second, above 0.
      unit: in the plural.
    """
    if rate >= 1:
        return f"{rate:.3g} {unit}/s"
    one = unit.removesuffix("es") if unit.endswith("ches") else unit.removesuffix("s")
    return f"{1 / rate:.1f} s/{one}"


def over(items: Iterable[T], what: str, total: int, *, unit: str = "") -> Iterator[T]:
    """Passes items on, with a bar; an item counts when the next one is asked for."""
    with contextlib.closing(bar(what, total, unit=unit)) as line:
        for item in items:
            yield item
            line.update(1)


def beside(log: Callable[[str], None]) -> Callable[[str], None]:
    """`log`, whose lines push the bars down instead of writing into them."""

    def say(text: str) -> None:
        import tqdm

        with tqdm.tqdm.external_write_mode():
            log(text)

    return say if sys.stderr.isatty() else log


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A line with the seconds that pass, for what says nothing of how far it is: `compiling ... 12 s`."""
    if not sys.stderr.isatty():
        yield
        return
    began, done = time.monotonic(), threading.Event()

    def tick() -> None:
        while not done.wait(TICK_S):
            sys.stderr.write(f"\r{what} ... {time.monotonic() - began:.0f} s")
            sys.stderr.flush()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        sys.stderr.write("\r\x1b[K")  # to the end of the line
        sys.stderr.flush()
