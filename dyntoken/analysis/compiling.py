"""What compiling a program costs, the first time and from jax's cache, and the memory that it will take."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from dyntoken.analysis.timing import Program


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
      executable: callable with the program's arguments; it compiles nothing.
      first_s: seconds to trace, lower and compile it; None if that was not asked for.
      cached_s: the same where the persistent cache holds it, as in a second process.
      memory: bytes that the compiler plans: arguments, results and what lies between;
        None where it does not say.
    """

    executable: Any
    first_s: float | None
    cached_s: float | None
    memory: int | None


def compiled(program: Program, *, timed: bool = True) -> Compiled:
    """Compiles a program, whose arguments may be shapes.

    Args:
      timed: compile it twice, first without what the persistent cache may hold, then out of
        one of its own. That empties jax's caches in memory: what was jitted before is traced anew.
    """
    if not timed:
        executable, _ = _compile(program)
        return Compiled(executable, None, None, memory(executable))
    with _empty_cache():
        executable, first = _compile(program)
        jax.clear_caches()
        _, again = _compile(program)
    return Compiled(executable, first, again, memory(executable))


def memory(executable: Any) -> int | None:
    """Bytes of arguments, results and temporaries of a compiled program; None where nobody says."""
    found = executable.memory_analysis()
    if found is None:
        return None
    held = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return int(held - found.alias_size_in_bytes)


def check_memory(planned: int | None, what: str) -> None:
    """Raises ValueError where a program needs more than the machine or the device has."""
    stats = jax.devices()[0].memory_stats() or {}
    has = stats.get("bytes_limit")
    if has is None and jax.default_backend() == "cpu" and hasattr(os, "sysconf"):
        has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if planned is not None and has and planned > has:
        raise ValueError(
            f"{what} needs {planned / 2**30:.1f} GiB of memory, of {has / 2**30:.1f}: take a smaller batch"
        )


def _compile(program: Program) -> tuple[Any, float]:
    start = time.perf_counter()
    executable = program.fn.lower(*program.args).compile()
    return executable, time.perf_counter() - start


@contextlib.contextmanager
def _empty_cache() -> Iterator[None]:
    """jax's persistent cache in a folder of its own, which holds every program whatever it took."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory(prefix="dyntoken-cache-") as folder:
        try:
            for name, value in zip(names, (folder, 0.0), strict=True):
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
