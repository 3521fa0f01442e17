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


def platform() -> str:
    """The one of `PLATFORMS` that is being traced for."""
    return _OVERRIDE.get() or jax.default_backend()


@contextlib.contextmanager
def trace_for(name: str) -> Iterator[None]:
    """Traces for another of `PLATFORMS` than the default one.

    Ahead-of-time compilation for a TPU on a CPU host needs it, and export. Trace a fresh
    function inside: what `jit` has cached outside is not traced again.
    """
    if name not in PLATFORMS:
        raise ValueError(f"unknown platform {name!r}: choose {', '.join(PLATFORMS[:-1])} or {PLATFORMS[-1]}")
    token = _OVERRIDE.set(name)
    try:
        yield
    finally:
        _OVERRIDE.reset(token)
