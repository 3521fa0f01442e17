"""Takes the lock of a workdir in a process of its own.

    python -m tests.faults.locker FOLDER ROUNDS

In each round it waits for `FOLDER/N/go`, tries to take the lock of `FOLDER/N`,
leaves its word in `FOLDER/N/said-PID`, and holds the lock until `FOLDER/N/end`.
"""

from __future__ import annotations

import os
import sys
import time

from etils import epath

from dyntoken.train.lock import Lock, LockedError


def wait_for(path: epath.Path) -> None:
    while not path.exists():
        time.sleep(0.001)


def main(folder: str, rounds: int) -> None:
    for number in range(rounds):
        workdir = epath.Path(folder) / str(number)
        said = workdir / f"said-{os.getpid()}"
        wait_for(workdir / "go")
        try:
            with Lock(workdir, log=lambda line: None):
                said.write_text("held")
                wait_for(workdir / "end")
        except LockedError as error:
            said.write_text(str(error))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
