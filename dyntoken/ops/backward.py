"""What backward passes of our own need: arguments that vary as others do, and work that waits."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dyntoken.ops import backend

Array = jax.Array
_PLAIN: contextvars.ContextVar[bool] = contextvars.ContextVar("dyntoken_plain", default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Traces operators from their definitions, for pure forward-mode derivatives (`jax.jvp`, `jax.jacfwd`).

    Their own backward passes serve `jax.grad` and what is built on it (`jax.hessian`, `jax.jvp` of a
    gradient). Trace a fresh function inside: what `jit` has cached outside is not traced again.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def is_plain() -> bool:
    """Whether operators are traced from their definitions."""
    return _PLAIN.get()


def varying_as(like: Array, *arrays: Array) -> tuple[Array, ...]:
    """`arrays`, varying over the mesh axes of `like` in a `shard_map`: a backward pass must return what it was given.

    A selection that chooses nothing: autodiff sees the cast that it brings and
    sums the gradient of what is replicated over the devices.
    """
    if backend.platform() == "onnx":
        return arrays  # an ONNX file has no gradient, and would keep what chooses nothing
    either = like.reshape(-1)[0] == 0
    return tuple(jnp.where(either, array, array) for array in arrays)


def after(x: Array, when: Array) -> Array:
    """`x`, for work that starts when `when` is there, and is not merged with the same work on `x` before.

    So a backward pass computes again what the forward pass did not keep. On a CPU XLA (jax 0.10.2) removes
    `optimization_barrier` before it merges and orders the work; there `x` gets a zero added that only `when` can tell.

    Args:
      x, when: of as many axes, and of one batch.
    """
    if backend.platform() != "cpu":
        return jax.lax.optimization_barrier((x, when))[0]
    first = jax.lax.stop_gradient(when[tuple(slice(1) if axis else slice(None) for axis in range(when.ndim))])
    return x + jnp.minimum(jnp.abs(first), 0.0).astype(x.dtype)


def recomputed(fn: Callable[..., Any], *args: Array | None) -> Any:
    """`fn(*args)`, of which a backward pass keeps the arguments alone and computes the rest again.

    `jax.checkpoint`, which keeps everything on a CPU (see `after`).

    Args:
      args: floats; the first one has as many axes as the first result, its batch, and varies in a `shard_map` if
        any does.
    """
    if is_plain():
        return fn(*args)
    there = [arg is not None for arg in args]

    def of(*arrays: Array) -> Any:
        given = iter(arrays)
        return fn(*(next(given) if here else None for here in there))

    run = jax.custom_vjp(of)
    run.defvjp(lambda *arrays: (of(*arrays), arrays), lambda arrays, g: _again(of, arrays, g))
    first, *others = (arg for arg in args if arg is not None)
    return run(first, *varying_as(first, *others))


def _again(fn: Callable[..., Any], arrays: tuple[Array, ...], g: Any) -> tuple[Array, ...]:
    first = jax.tree.leaves(g)[0]
    waits = [x.ndim == first.ndim and len(x) == len(first) for x in arrays]
    arrays = tuple(after(x, first) if wait else x for x, wait in zip(arrays, waits, strict=True))
    return jax.vjp(fn, *arrays)[1](g)
