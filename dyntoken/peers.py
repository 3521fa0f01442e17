"""Watches the other processes of a program: whoever is lost, or leaves, ends this one too, in one line.

jax does that after its own heartbeat's time-out and with a stack dump out of C++, at once where process 0
is lost, which serves the others. Its options allow nothing simpler (jaxlib 0.10): a missed heartbeat cannot
call a Python function (std::bad_cast), and jax_enable_recoverability keeps a process alive only as long as
process 0 is. Here every process counts up its key in jax's key-value store and reads those of the others;
what C++ writes passes a thread that keeps its farewell back, and SIGABRT waits until our line is out.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from typing import Any, BinaryIO

from dyntoken import interrupt

KEYS = "dyntoken/peers/"
END_S = 60  # how long a process that ends well waits for the others
GREETING = re.compile(rb"\[Gloo\] Rank|is connected to \d+ peer ranks")  # several threads write it in pieces
FATAL = b"Terminating process because the JAX distributed service"
AGAIN = "run the same command again for every process to go on from the newest checkpoint"
_watch: Watch | None = None


def watch(process: int, processes: int, client: Any, *, lost_after: float) -> None:
    """Starts to watch.

    Args:
      process: which one this is.
      processes: how many there are.
      client: of jax's key-value store.
      lost_after: seconds without a sign of life after which one counts as lost.
    """
    global _watch
    _watch = Watch(process, processes, client, lost_after)
    interrupt.before_end(_watch.tell)
    atexit.register(_watch.leave)


def blame(error: BaseException) -> None:
    """Ends the process in one line if `error` comes of a lost process, else tells the others of it.

    Does nothing where there are no others.
    """
    if _watch is not None:
        _watch.blame(error)


class Watch:
    """See `watch`."""

    def __init__(self, process: int, processes: int, client: Any, lost_after: float):
        self._me, self._client, self._lost_after = process, client, lost_after
        self._period = min(1.0, lost_after / 8)
        self._patience = lost_after
        self._beats, self._reason = 0, ""
        self._others = [i for i in range(processes) if i != process]
        now = time.monotonic()
        self._seen = dict.fromkeys(self._others, ("", now))
        self._lock, self._over = threading.Lock(), threading.Event()
        self._console = _keep_farewells_back(self._coordinator_lost) if os.name == "posix" else None
        self._unanswered = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        threading.Thread(target=self._await_answers, daemon=True).start()

    def _await_answers(self) -> None:
        """A process 0 that hangs answers never, and not with an error."""
        while not self._over.wait(self._period):
            # Counted, not measured: this process may have been suspended itself.
            self._unanswered += 1
            if self._unanswered * self._period > self._lost_after + 1:
                self._end(self._silent(0, self._lost_after), linger=False)

    def _run(self) -> None:
        while not self._over.wait(self._period):
            try:
                self._beat()
                said = dict(self._client.key_value_dir_get(KEYS))
            except Exception:  # nobody answers
                if not self._over.is_set():
                    self._coordinator_lost()
                return
            self._unanswered = 0
            self._look(said)

    def _beat(self) -> None:
        self._beats += 1
        state = json.dumps([self._beats, self._reason])
        self._client.key_value_set(f"{KEYS}{self._me}", state, allow_overwrite=True)

    def _look(self, said: dict[str, str]) -> None:
        now = time.monotonic()
        for other in self._others:
            state = said.get(f"{KEYS}{other}", "")
            if state != self._seen[other][0]:
                self._seen[other] = (state, now)
            reason = json.loads(state)[1] if state else ""
            if reason and not self._reason:
                time.sleep(self._period)  # often this process is about to say the same by itself
                self._end(reason if "was lost" in reason else f"process {other} ended: {reason}")
        silent = {other: now - when for other, (_, when) in self._seen.items()}
        worst = max(silent, key=silent.get)
        if silent[worst] > self._patience and not self._reason:
            self._end(self._silent(worst, silent[worst]))

    def _silent(self, other: int, seconds: float) -> str:
        flag = f"--lost_after={self._lost_after:g}"
        return f"process {other} was lost: no sign of life for {seconds:.0f} s ({flag}); {AGAIN}"

    def _coordinator_lost(self) -> None:
        if not self._over.is_set() and not self._reason:
            self._end(f"process 0 was lost, which connects the others; {AGAIN}", linger=False)

    def _end(self, reason: str, *, linger: bool = True) -> None:
        """Says why and ends the process; the first one to call it wins."""
        if not self._lock.acquire(blocking=False):
            time.sleep(60)  # the other thread ends the process
        print(f"error: {reason}", file=sys.stderr, flush=True)
        if linger:
            self._linger(reason)
        os._exit(1)

    def _linger(self, reason: str) -> None:
        """Lets the others read why, above all if this is the process that connects them."""
        self._reason = reason
        threading.Thread(target=self._say, daemon=True).start()  # which hangs where process 0 does
        time.sleep(2 * self._period)

    def _say(self) -> None:
        with contextlib.suppress(Exception):
            self._beat()

    def tell(self, word: str) -> None:
        """Lets the others know that this process ends at once."""
        with self._lock:
            self._linger(f"{word}; {AGAIN}")

    def blame(self, error: BaseException) -> None:
        """See `blame`."""
        from jax.errors import JaxRuntimeError

        if isinstance(error, JaxRuntimeError):
            # Perhaps of a collective whose other side is gone; then that is silent from now on.
            self._patience = min(self._lost_after, 3 * self._period)
            time.sleep(2 * self._patience)
        self._end(" ".join(str(error).split()) or type(error).__name__)

    def leave(self) -> None:
        """The end of the process: together, or else the error that ends it."""
        if self._over.is_set():
            return
        error = getattr(sys, "last_value", None)  # the program's traceback was printed
        if error is not None:
            self.blame(error)
        try:
            self._client.wait_at_barrier("dyntoken_end", END_S * 1000)
        except Exception:
            self._end(f"the other processes did not end within {END_S} s after this one")
        self._over.set()
        self._thread.join()
        if self._console is not None:
            sys.stdout.flush()
            os.dup2(self._console[0], 1)
            os.dup2(self._console[1], 2)


def _keep_farewells_back(lost: Any) -> tuple[int, int]:
    """Puts a thread between C++ and the console; returns descriptors of the console's stdout and stderr."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    # abort() calls sleep(SIGABRT): six seconds in which the other threads may end the process better.
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    sys.stdout.flush()
    console = os.dup(1), os.dup(2)
    options = {"mode": "w", "buffering": 1, "errors": "backslashreplace", "closefd": False}
    sys.stdout = sys.__stdout__ = os.fdopen(console[0], **options)
    sys.stderr = sys.__stderr__ = os.fdopen(console[1], **options)
    read, write = os.pipe()
    os.dup2(write, 1)
    os.dup2(write, 2)
    os.close(write)
    threading.Thread(target=_forward, args=(os.fdopen(read, "rb"), console[1], lost), daemon=True).start()
    return console


def _forward(lines: BinaryIO, console: int, lost: Any) -> None:
    for line in lines:
        if FATAL in line:
            lost()
            return  # whoever ends this process has said why
        if not GREETING.search(line):
            os.write(console, line)
