"""Choosing a static number of tokens, moving them, and keeping their addresses.

B batch, n rows in, k rows kept. Counts are Python ints, so every shape is
static.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from dyntoken.ops import backend

Array = jax.Array
HIGHEST = jax.lax.Precision.HIGHEST
_TOP = 0x7FFFFFFF  # the largest int32


def order(scores: Array) -> Array:
    """Row numbers `[B, n]` from best to worst; equal scores keep their order.

    NaN comes first, the signed zeros are equal: the same on every platform. On a
    TPU `top_k` and `argsort` compile to a full sort, and what runs ONNX may sort
    equal scores as it likes, so there the rank is counted by comparison, which is
    exact too.
    """
    keys = _keys(scores)
    if backend.platform() not in ("tpu", "onnx"):
        return jnp.argsort(keys, axis=-1, descending=True, stable=True).astype(jnp.int32)
    rank, rows = _ranks(keys), jnp.arange(keys.shape[-1], dtype=jnp.int32)
    at = (rank[:, None, :] == rows[None, :, None]).astype(jnp.int32)  # [B, rank, row]
    return (at * rows[None, None, :]).sum(axis=-1)


def ranks(scores: Array) -> Array:
    """The place of each row in `order`, `[B, n]`, counted by comparison."""
    return _ranks(_keys(scores))


def _ranks(keys: Array) -> Array:
    rows = jnp.arange(keys.shape[-1], dtype=jnp.int32)
    better = keys[:, None, :] > keys[:, :, None]
    tied = (keys[:, None, :] == keys[:, :, None]) & (rows[None, None, :] < rows[None, :, None])
    return (better | tied).sum(axis=-1, dtype=jnp.int32)


def _keys(scores: Array) -> Array:
    """Integers that are ordered as the scores are, NaN above all: comparing floats, NaN has no rank.

    In ONNX, which cannot read the bits of a float, the scores themselves, NaN as infinity.
    """
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    if backend.platform() == "onnx":
        return jnp.where(jnp.isnan(scores), jnp.inf, scores)
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    bits = jnp.where(bits < 0, bits ^ _TOP, bits)  # the larger a negative number's bits, the smaller it is
    return jnp.where(jnp.isnan(scores), _TOP, bits)


def split(scores: Array, keep: int) -> tuple[Array, Array]:
    """The `keep` best rows and the rest, `[B, keep]` and `[B, n - keep]`, best first."""
    if not 0 < keep <= scores.shape[-1]:
        raise ValueError(f"keep must be between 1 and the {scores.shape[-1]} rows at hand, got {keep}")
    ranked = order(scores)
    return ranked[:, :keep], ranked[:, keep:]


def take(x: Array, rows: Array) -> Array:
    """Rows of `x [B, n, ...]` at `rows [B, k]`: `[B, k, ...]`.

    A gather, or on a TPU a one-hot product (exact: each output is one input).
    """
    if x.ndim == 3 and backend.platform() == "tpu":
        at = jax.nn.one_hot(rows, x.shape[1], dtype=x.dtype)
        return jnp.einsum("bkn,bnc->bkc", at, x, precision=HIGHEST)
    index = rows.reshape(rows.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def rows_outermost(x: Array) -> Array:
    """`x [B, n, C]`, on a TPU laid out with its rows outermost, as its compiler lays out a model without sites.

    Batched products, as of `take`, leave the batch outermost there, and every norm behind them would change that.
    """
    if backend.platform() != "tpu" or backend.stable():
        return x
    return with_layout_constraint(x, Layout(major_to_minor=(1, 0, 2)))


def gather_or_zero(x: Array, rows: Array, axis: int = 1) -> Array:
    """Rows of `x [B, ...]` along one axis at `rows [B, k]`, zero where `rows` is -1.

    A gather, or on a TPU a one-hot product (exact), as in `take`.
    """
    axis %= x.ndim
    if backend.platform() == "tpu":
        at = jax.nn.one_hot(rows, x.shape[axis], dtype=x.dtype)  # -1 gives a row of zeros
        y = jnp.einsum("bkn,bn...->bk...", at, jnp.moveaxis(x, axis, 1), precision=HIGHEST)
        return jnp.moveaxis(y, 1, axis)
    shape = [1] * x.ndim
    shape[0], shape[axis] = rows.shape
    index = rows.reshape(shape)
    values = jnp.take_along_axis(x, jnp.maximum(index, 0), axis=axis)
    return jnp.where(index >= 0, values, jnp.zeros((), x.dtype))


def read_maps(x: Array, rows: Array) -> Array:
    """`S x S^T` with S the one-hot rows: maps `[B, heads, n, n]` to `[B, heads, k, k]`."""
    return gather_or_zero(gather_or_zero(x, rows, axis=2), rows, axis=3)


def shift_past_prefix(rows: Array, prefix: int) -> Array:
    """Numbers of patch rows `[B, k]` (or -1) to numbers among all rows, `[B, prefix + k]`."""
    first = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32)[None], (rows.shape[0], prefix))
    return jnp.concatenate([first, jnp.where(rows >= 0, rows + prefix, -1)], axis=1)


def survivors(carrier: Array, place: Array) -> Array:
    """Carriers `[B, N0]` of the patches whose own row still stands, -1 for all others.

    Args:
      carrier: `[B, N0]`; place: `[B, n]`, both of `Tokens`.
    """
    cells = jnp.arange(carrier.shape[1], dtype=jnp.int32)[None, :]
    return jnp.where(lookup(place, carrier) == cells, carrier, -1)


def mask_of(rows: Array, n: int) -> Array:
    """Row numbers `[B, k]` to a 0/1 float mask `[B, n]`."""
    return (rows[:, :, None] == jnp.arange(n)[None, None, :]).any(axis=1).astype(jnp.float32)


def lookup(table: Array, rows: Array) -> Array:
    """`table[b, rows[b, i]]`, and -1 where `rows` is -1.

    Args:
      table: `[B, m]` integers.
      rows: `[B, r]` integers into it, or -1.
    """
    values = jnp.take_along_axis(table, jnp.maximum(rows, 0), axis=1)
    return jnp.where(rows >= 0, values, -1).astype(jnp.int32)


def sizes(carrier: Array, n: int) -> Array:
    """How many original patches each of n rows stands for, `[B, n]` float32."""
    return (carrier[:, :, None] == jnp.arange(n)[None, None, :]).sum(axis=1, dtype=jnp.float32)


def inverse(rows: Array, n: int) -> Array:
    """Old row -> its position in `rows [B, k]`, or -1 if it is not there: `[B, n]`."""
    hit = rows[:, :, None] == jnp.arange(n)[None, None, :]  # [B, k, n]
    position = jnp.arange(rows.shape[1], dtype=jnp.int32)[None, :, None]
    return (jnp.where(hit, position + 1, 0).sum(axis=1) - 1).astype(jnp.int32)
