"""Where jax keeps compiled programs from one process to the next: on by default, in the user's cache folder.

jax writes there what took it a second or more to compile, from process 0 of a run alone, and nothing that calls
back into Python. It stands beside everything and imports no jax.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import sys
import zlib

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
NONE = "none"
MOST_BYTES = 2 << 30  # of the default folder; what was not used for longest goes first
HELP = (
    "folder in which compiled programs stay for the next process, or none; by default dyntoken/jax in "
    f"the user's cache folder, unless {VARIABLE} names one"
)


def use(folder: str = "") -> str | None:
    """Makes jax keep compiled programs; call it before the first of them is compiled.

    Args:
      folder: a folder or URI, "none", or "" for the default, which leaves it to
        `JAX_COMPILATION_CACHE_DIR` where that is set, keeps itself below 2 GiB, and is
        none where it cannot be written.

    Returns:
      The folder, None for none.

    Raises:
      OSError: a given local folder cannot be made.
    """
    if folder == NONE:
        return _set("")
    if folder:
        if "://" not in folder:
            folder = os.path.abspath(os.path.expanduser(folder))
            os.makedirs(folder, exist_ok=True)
        return _set(folder)
    if VARIABLE in os.environ:
        return os.environ[VARIABLE] or None
    try:
        path = default_folder()
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            return None
        trim(path, MOST_BYTES)
    except (OSError, RuntimeError):  # a home that is read-only, or none at all
        return None
    return _set(str(path))


def default_folder() -> pathlib.Path:
    """`dyntoken/jax/MACHINE` in the user's cache folder.

    A CPU's programs hold instructions that another one may lack, and homes are shared
    between machines: MACHINE says what the processor can do.
    """
    if os.environ.get("XDG_CACHE_HOME"):
        base = pathlib.Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32":
        base = pathlib.Path(os.environ.get("LOCALAPPDATA") or pathlib.Path.home() / "AppData" / "Local")
    else:
        base = pathlib.Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        told = "\n".join(
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        )
    except OSError:
        told = platform.processor()
    return base / "dyntoken" / "jax" / f"{platform.machine()}-{zlib.crc32(told.encode()):08x}"


def trim(folder: pathlib.Path, most: int) -> None:
    """Removes the files that were read longest ago until the folder holds at most so many bytes."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may remove it
            found = path.stat()
            files.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    held = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if held <= most:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        held -= size


def _set(folder: str) -> str | None:
    """For this process and those that it starts."""
    os.environ[VARIABLE] = folder
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_compilation_cache_dir", folder or None)
    return folder or None
