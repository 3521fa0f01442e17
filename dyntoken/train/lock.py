"""One run at a time in a workdir.

A run that wants to write leaves a claim, `WORKDIR/lock-HOST-PID-ID.json`, and
only then looks for others: of two that start at once at least one sees the
other. This needs no more of a file system than that a file which was written
is listed, so it holds on network file systems and on `gs://`, where locks and
exclusive creation cannot be relied upon.

The claim is renewed while its owner lives. It is cleared away once the owner
is gone. That is known at once on its own machine; on another one the claim
must not be renewed while it is watched, so clocks that differ do no harm.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from etils import epath

from dyntoken import interrupt
from dyntoken.paths import atomic_write
from dyntoken.train.logging import duration

Claim = dict[str, Any]
CLAIM = re.compile(r"lock-.+\.json")
BEAT_S, STALE_S = 15.0, 120.0
SETTLE_S = 30.0  # for one that asks at the same time to give way


class LockedError(RuntimeError):
    """Another run writes to the workdir; the message names it."""


class Lock:
    """The right to write to a workdir, held while it is entered; `LockedError` if another run holds it.

    Args:
      workdir: an existing folder; may be on `gs://`.
    """

    def __init__(self, workdir: epath.Path, log: Callable[[str], None] = print):
        self._workdir, self._log = workdir, log
        self._mine: Claim = {**_here(), "id": uuid.uuid4().hex[:8], "since": time.time(), "held": False}
        host = re.sub(r"[^\w.]", "_", self._mine["host"])
        self._name = f"lock-{host}-{self._mine['pid']}-{self._mine['id']}.json"
        self._writing, self._end, self._lost = threading.Lock(), threading.Event(), False
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._watched: dict[str, tuple[Any, float]] = {}

    def __enter__(self) -> Lock:
        # Also where a signal ends the process at once, as during a compilation.
        interrupt.before_end(lambda word: (self._end.set(), self._remove(self._name)))
        try:
            self._write()
            self._beating.start()
            self._outwait()
            self._mine["held"] = True
            self._write()
            held = [claim for claim in self._others() if claim["held"]]  # taken while this process slept
            if held:
                raise LockedError(self._explain(held[0]))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._beating.ident is not None:
            self._beating.join(BEAT_S)  # not for ever, where the storage hangs
        self._remove(self._name)

    def check(self) -> None:
        """Raises `LockedError` if the lock was taken away, because this process was not heard of for too long."""
        if self._lost:
            raise LockedError(
                f"the lock of {self._workdir} was taken away while this process slept or was cut off from it: "
                "another run may go on there, so nothing more is written; otherwise run the same command again"
            )

    def _outwait(self) -> None:
        """Returns when there is no other claim; raises where one has precedence."""
        deadline = time.monotonic() + STALE_S + SETTLE_S
        while others := self._others():
            for claim in others:
                alive = self._alive(claim)
                if alive is False:
                    self._log(f"clearing away the lock of a run that is gone ({_owner(claim)})")
                    self._remove(claim["name"])
                elif (
                    alive and (claim["held"] or _order(claim) < _order(self._mine))
                ) or time.monotonic() > deadline:
                    raise LockedError(self._explain(claim))
            time.sleep(0.1)

    def _others(self) -> list[Claim]:
        claims = []
        for entry in self._workdir.iterdir():
            if CLAIM.fullmatch(entry.name) and entry.name != self._name:
                claim: Claim = {"host": "an unknown host", "pid": "?", "held": True, "name": entry.name}
                with contextlib.suppress(FileNotFoundError):  # its owner has just ended
                    text = entry.read_text()
                    with contextlib.suppress(ValueError, TypeError):  # half-written when the machine died
                        claim |= json.loads(text)
                    claims.append(claim)
        return claims

    def _alive(self, claim: Claim) -> bool | None:
        """Whether the owner of a claim lives; None as long as that is not known."""
        if claim.get("machine") == self._mine["machine"]:
            return _runs(claim["pid"]) and _started(claim["pid"]) == claim["started"]
        beat, now = claim.get("beat"), time.monotonic()
        if claim["name"] not in self._watched:
            self._watched[claim["name"]] = beat, now
            self._log(f"{self._workdir} has the lock of {_owner(claim)}: watching whether that is alive")
        first, began = self._watched[claim["name"]]
        if beat != first:
            return True
        age = time.time() - beat if beat else STALE_S
        return None if now - began < min(max(2 * BEAT_S, STALE_S - age), STALE_S) else False

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            with contextlib.suppress(Exception):  # storage that fails for a while
                if self._mine["held"] and all(e.name != self._name for e in self._workdir.iterdir()):
                    self._lost = True
                    return
                self._write()

    def _write(self) -> None:
        with self._writing:
            self._mine["beat"] = time.time()
            atomic_write(self._workdir / self._name, json.dumps(self._mine))

    def _remove(self, name: str) -> None:
        with contextlib.suppress(Exception):  # what stays is cleared away by the next run
            (self._workdir / name).unlink(missing_ok=True)

    def _explain(self, claim: Claim) -> str:
        return (
            f"{self._workdir} is in use by {_owner(claim)}: wait for that run, stop it, or give another "
            f"--workdir (if it is not running, delete {self._workdir / claim['name']})"
        )


def _owner(claim: Claim) -> str:
    since = f" since {duration(time.time() - claim['since'])}" if claim.get("since") else ""
    return f"process {claim['pid']} on {claim['host']}{since}"


def _order(claim: Claim) -> tuple[float, str]:
    return claim.get("since", 0.0), claim.get("id", "")


def _here() -> Claim:
    """This process, and the machine on which its number means it."""
    host, pid = socket.gethostname(), os.getpid()
    machine = [host]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:  # Linux
        machine += [file.read().strip(), os.readlink("/proc/self/ns/pid")]  # containers count anew
    return {"host": host, "machine": machine, "pid": pid, "started": _started(pid)}


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> str | None:
    """When a process was started, as the system tells it: numbers are used again. None: not known."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]
