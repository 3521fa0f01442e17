"""Ctrl-C and SIGTERM of a program: one line and exit code 128 + signal, whatever it is doing.

A handler in Python runs when the main thread comes back to Python, so not while XLA compiles, and an
exception out of it in the middle of an import ends as a dump of C frames. Here the signal's number goes by
a pipe to a thread, which ends the process, unless somebody has asked to be told first (`listening`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
PATIENCE_S = 3.0  # of a user who pressed Ctrl-C and sees nothing happen
_installed = False
_listener: Callable[[int], None] | None = None
_farewells: list[Callable[[str], None]] = []


def is_program() -> bool:
    """Whether this process is `python -m dyntoken.NAME`, `python -m dyntoken` or `dyntoken`."""
    words = sys.orig_argv
    if any(
        a == "-m" and (b == "dyntoken" or b.startswith("dyntoken.")) for a, b in itertools.pairwise(words)
    ):
        return True
    return _is_script(words)


def _is_script(words: list[str]) -> bool:
    return len(words) > 1 and os.path.basename(words[1]) == "dyntoken" and not os.path.isdir(words[1])


def install() -> None:
    """Takes over SIGINT and SIGTERM of this process; for programs, and before their slow imports."""
    global _installed
    if _installed or os.name != "posix":
        return
    _installed = True
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def handle(signum: int, frame: object) -> None:
        other = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        if other != write:  # of an event loop that runs in this thread; the number went there
            signal.set_wakeup_fd(other)
            os.write(write, bytes([signum]))

    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup, and shells in the background
            signal.signal(signum, handle)
    threading.Thread(target=_listen, args=(read,), daemon=True).start()


def _listen(read: int) -> None:
    while True:
        signum = os.read(read, 1)[0]
        if signum in SIGNALS and not _tell(signum):
            end(signum)


def _tell(signum: int) -> bool:
    """Hands the signal to the listener, once."""
    global _listener
    told, _listener = _listener, None
    if told is None:
        return False
    told(signum)
    return True


def end(signum: int) -> None:
    """Ends this process at once, in one line."""
    line = f"{WORDS[signum]}{go_on()}"
    line = f"\r\x1b[K{line}" if sys.stderr.isatty() else line  # in the place of a live line
    for farewell in _farewells:
        _try(farewell, WORDS[signum], within=PATIENCE_S)
    _try(sys.stdout.flush, within=1.0)
    print(line, file=sys.stderr, flush=True)
    os._exit(128 + signum)


def _try(fn: Callable[..., None], *args: str, within: float) -> None:
    """Calls a function that may fail; a file system or a reader that hangs must not hold us."""

    def call() -> None:
        with contextlib.suppress(Exception):
            fn(*args)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(within)


def before_end(farewell: Callable[[str], None]) -> None:
    """Has a function called with "interrupted" or "terminated" before that ends the process."""
    _farewells.append(farewell)


def go_on() -> str:
    """How to go on with a training, `"; to go on: COMMAND"`; empty for what starts anew anyway."""
    words = sys.orig_argv
    if not is_program() or not ("dyntoken.main" in words or "train" in words):
        return ""
    if {"--mode=eval", "--dry_run", "--dry_run=true"} & set(words):
        return ""
    if _is_script(words):
        return f"; to go on: {shlex.join(['dyntoken', *words[2:]])}"
    return f"; to go on: python {shlex.join(words[1:])}"


@contextlib.contextmanager
def listening(asked: Callable[[int], None], signals: tuple[signal.Signals, ...] = SIGNALS) -> Iterator[None]:
    """While it is entered, the first of some signals calls `asked(signum)`; the second one ends the process.

    Outside of a program (a notebook) the second Ctrl-C raises KeyboardInterrupt. Does nothing outside of
    the main thread.
    """
    global _listener
    if _installed:
        _listener = lambda signum: (asked(signum), _reassure())  # noqa: E731
        try:
            yield
        finally:
            _listener = None
        return
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in signals}

    def handle(signum: int, frame: object) -> None:
        signal.signal(signum, before[signum])
        asked(signum)

    for signum, handler in before.items():
        # None: set from C, before Python started.
        if handler not in (None, signal.SIG_IGN):
            signal.signal(signum, handle)
    try:
        yield
    finally:
        for signum, handler in before.items():
            if handler is not None:
                signal.signal(signum, handler)


def _reassure() -> None:
    line = "saving, then stopping (a second Ctrl-C ends at once)"
    timer = threading.Timer(PATIENCE_S, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()


class StopAskedError(Exception):
    """Work that can be done again was left, because this process is to stop."""


class Stop:
    """Turns SIGTERM and SIGINT into `asked`, while it is entered; a second one ends the process.

    Args:
      several: whether there are other processes. They are asked through the cluster's notice instead
        (`Checkpoints.preempted`), so that all of them stop at the same step.

    Attributes:
      signum: of the signal that came; 0 for none.
    """

    def __init__(self, several: bool = False) -> None:
        self.signum, self._several = 0, several
        self._stack = contextlib.ExitStack()

    @property
    def asked(self) -> bool:
        """Whether this process alone decides to stop."""
        return self.signum != 0 and not self._several

    def check(self) -> None:
        """Raises `StopAskedError` if `asked`."""
        if self.asked:
            raise StopAskedError

    def __enter__(self) -> Stop:
        if not self.signum:
            # jax's handler of SIGTERM is set from C, where Python does not see it, and must stay.
            signals = (signal.SIGINT,) if self._several else SIGNALS
            self._stack.enter_context(listening(self._ask, signals))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _ask(self, signum: int) -> None:
        self.signum = signum
        if self._several and signum != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)  # jax waits for it, and gives notice to the others
