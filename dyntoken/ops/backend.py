"""Which platform the operators are traced for.

The fastest exact form of an operator differs by platform (a gather on a GPU is
a one-hot product on a TPU). The choice is static, made while tracing.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

PLATFORMS = ("cpu", "gpu", "tpu", "onnx")  # an ONNX file, whatever runs it, has forms of its own
_OVERRIDE: contextvars.ContextVar[str | None] = contextvars.ContextVar("dyntoken_platform", default=None)
_STABLE: contextvars.ContextVar[bool] = contextvars.ContextVar("dyntoken_stable", default=False)


def platform() -> str:
    """The one of `PLATFORMS` that is being traced for."""
    return _OVERRIDE.get() or jax.default_backend()


def stable() -> bool:
    """Whether only operations are to be traced that `jax.export` writes."""
    return _STABLE.get()


@contextlib.contextmanager
def trace_for(name: str, *, stable: bool = False) -> Iterator[None]:
    """Traces for another of `PLATFORMS` than the default one.

    Ahead-of-time compilation for a TPU on a CPU host needs it, and export. Trace a fresh
    function inside: what `jit` has cached outside is not traced again.

    Args:
      stable: leaves out what `jax.export` refuses to write, which is layouts on a TPU: results are equal.
    """
    if name not in PLATFORMS:
        raise ValueError(f"unknown platform {name!r}: choose {', '.join(PLATFORMS[:-1])} or {PLATFORMS[-1]}")
    tokens = _OVERRIDE.set(name), _STABLE.set(stable)
    try:
        yield
    finally:
        _OVERRIDE.reset(tokens[0])
        _STABLE.reset(tokens[1])
