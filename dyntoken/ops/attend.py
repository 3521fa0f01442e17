"""Attention with token masks, as DynamicViT trains it and as pruning means it.

Shapes: B batch, H heads, T rows (prefix + patches), D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dyntoken.ops import backend, backward

Array = jax.Array
POLICY_EPS = 1e-6  # raoyongming/DynamicViT, softmax_with_policy


def with_prefix(alive: Array, prefix: int) -> Array:
    """`alive` over patches `[B, N]` to a policy over all rows `[B, prefix + N]`."""
    ones = jnp.ones((alive.shape[0], prefix), alive.dtype)
    return jnp.concatenate([ones, alive], axis=1)


def policy_softmax(logits: Array, policy: Array, eps: float = POLICY_EPS) -> Array:
    """Softmax over keys weighted by a (straight-through) keep mask.

    DynamicViT, section 3.2, in the form of its code: the maximum runs over all
    keys, masked ones included; every row may attend to itself; `eps` keeps a
    fully masked row finite. Gradients flow through the maximum, as in torch.

    Args:
      logits: `[B, H, T, T]`.
      policy: `[B, T]`, 1.0 keeps a key, 0.0 hides it.

    Returns:
      Probabilities `[B, H, T, T]` in float32.
    """
    rows = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    keys = policy.astype(jnp.float32)[:, None, None, :]
    own = jnp.eye(rows, dtype=jnp.float32)[None, None]
    weight = keys + (1.0 - keys) * own
    p = jnp.exp(logits - logits.max(axis=-1, keepdims=True)) * weight
    return (p + eps / rows) / (p.sum(axis=-1, keepdims=True) + eps)


def policy_attention(
    q: Array, k: Array, v: Array, policy: Array, *, scale: float, eps: float = POLICY_EPS
) -> Array:
    """`policy_softmax` of the scaled products, times the values, with a backward pass of its own.

    It keeps no array of queries by keys: the weights are computed again from the
    maximum and the sum of each row. The policy is a factor of rows `[T, D]`, a
    row's own key is added apart, and the sums over keys that the gradients of
    the policy and of the maximum hold are products of such rows, too.

    Args:
      q, k, v: `[B, H, T, D]`.
      policy: `[B, T]`, 1.0 keeps a key, 0.0 hides it; its gradient is that of `policy_softmax`.

    Returns:
      `[B, H, T, D]` in the type of `v`.
    """
    if backward.is_plain():
        p = policy_softmax(logits(q, k, scale=scale), policy, eps)
        return jnp.einsum("bhqk,bhkd->bhqd", p.astype(v.dtype), v)
    (policy,) = backward.varying_as(q, policy.astype(jnp.float32))  # a constant ahead of the first site
    return _policy_attention(q, k, v, policy, scale, eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _policy_attention(q: Array, k: Array, v: Array, policy: Array, scale: float, eps: float) -> Array:
    return _attend_policy(q, k, v, policy, scale, eps)[0]


def _attend_policy(
    q: Array, k: Array, v: Array, policy: Array, scale: float, eps: float
) -> tuple[Array, tuple[Array, ...]]:
    """The result, and what the backward pass keeps."""
    products = logits(q, k, scale=scale)
    highest = products.max(axis=-1, keepdims=True)
    e = jnp.exp(products - highest)
    keys = policy[:, None, :, None]
    own = _own(q, k, highest, scale) * (1.0 - keys)
    wide = v.astype(jnp.float32)
    ones = jnp.ones((*wide.shape[:-1], 1))  # the sum of a row's weights is one more column of the product
    y = _product("bhqk,bhkd->bhqd", e, jnp.concatenate([wide * keys, ones * keys], axis=-1), v.dtype)
    total = y[..., -1:] + own + eps
    y = (y[..., :-1] + own * wide + eps * wide.mean(axis=2, keepdims=True)) / total
    y = y.astype(v.dtype)
    return y, (q, k, v, policy, highest, total, y)


def _attend_policy_back(
    scale: float, eps: float, kept: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array, Array]:
    q, k, v, policy, highest, total, y = kept
    # Or the compiler would find the forward pass's arrays of queries by keys, and keep them.
    q = backward.after(q, dy)
    wide_q, wide_k, wide_v, y = (t.astype(jnp.float32) for t in (q, k, v, y))
    products = logits(q, k, scale=scale)
    e = jnp.exp(products - highest)
    keys = policy[:, None, :, None]
    g = dy.astype(jnp.float32) / total
    mean = (g * y).sum(axis=-1, keepdims=True)
    # Of the logits: through the weights of all keys, through that of the own one, and through the maximum,
    # which only moves the share of eps.
    uniform = (g * wide_v.mean(axis=2, keepdims=True)).sum(axis=-1, keepdims=True)
    moved = eps * (mean - uniform)
    dp = _product("bhqd,bhkd->bhqk", g, v, v.dtype) - mean
    dl = e * dp * policy[:, None, None, :] - moved * (products == highest)
    own = _own(q, k, highest, scale)
    own_dp = own * ((g * wide_v).sum(axis=-1, keepdims=True) - mean)
    own_dl = own_dp * (1.0 - keys)
    dq = _product("bhqk,bhkd->bhqd", dl, k, q.dtype) + own_dl * wide_k
    dk = _product("bhqk,bhqd->bhkd", dl, q, q.dtype) + own_dl * wide_q
    seen = _product("bhqk,bhqd->bhkd", e, jnp.concatenate([g, mean], axis=-1), v.dtype)
    others, seen = seen[..., -1:] + own_dp, seen[..., :-1]
    dv = seen * keys + own * (1.0 - keys) * g + eps / v.shape[2] * g.sum(axis=2, keepdims=True)
    dpolicy = ((seen * wide_v).sum(axis=-1, keepdims=True) - others).sum(axis=(1, 3))
    return (dq * scale).astype(q.dtype), (dk * scale).astype(k.dtype), dv.astype(v.dtype), dpolicy


_policy_attention.defvjp(_attend_policy, _attend_policy_back)


def _own(q: Array, k: Array, highest: Array, scale: float) -> Array:
    """The weight of each row's own key before it is normalised, `[B, H, T, 1]` float32."""
    product = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    return jnp.exp(product * scale - highest)


def _product(spec: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """Of factors in `dtype`, summed in float32."""
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def masked_softmax(logits: Array, policy: Array) -> Array:
    """Exact softmax over the keys alive, `[B, H, T, T]` in float32.

    Equals the softmax of the shortened sequence: the mask form's counterpart of
    gathering. A row with no key alive gets uniform weights, not NaN.
    """
    keys = policy[:, None, None, :] > 0.5
    logits = jnp.where(keys, logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def gated_softmax(logits: Array, policy: Array | None, eps: float | None) -> Array:
    """Softmax over keys under the policy of a `types.Gate`, `[B, H, T, T]` in float32.

    Args:
      policy: `[B, T]` or `[B, T, T]` (query, key); None masks nothing.
      eps: None masks exactly; a number weighs keys by the policy, whose gradient
        then flows, as `policy_softmax` does but without an exception for a
        row's own key (LTMP).
    """
    if policy is None:
        return jax.nn.softmax(logits, axis=-1)
    keys = policy[:, None, None, :] if policy.ndim == 2 else policy[:, None]
    logits = logits.astype(jnp.float32)
    if eps is None:
        return jax.nn.softmax(jnp.where(keys > 0.5, logits, jnp.finfo(jnp.float32).min), axis=-1)
    # No gradient through the maximum: it is of the size of eps, and 0 / 0 where a compiler computes
    # the logits twice, so that none of them equals their maximum.
    highest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    p = jnp.exp(logits - highest) * keys.astype(jnp.float32)
    return (p + eps / logits.shape[-1]) / (p.sum(axis=-1, keepdims=True) + eps)


def gated(
    q: Array,
    k: Array,
    v: Array,
    policy: Array | None,
    heads: Array | None,
    bias: Array | None,
    weight: Array | None,
    *,
    scale: float,
    eps: float | None,
    drop: Callable[[Array], Array],
) -> tuple[Array, Array, Array]:
    """Attention with what a `types.Gate` leaves out.

    Args:
      q, k, v: `[B, H, T, D]`.
      policy, eps: see `gated_softmax`.
      heads: `[B, H]`, 0.0 for heads that are left out: of what they read and write.
      bias, weight: added to the scaled logits; `weight` is not in the logits returned.
      drop: dropout of the weights.

    Returns:
      The result `[B, H, T, D]`, the weights and the logits, `[B, H, T, T]`.
    """
    if heads is not None:
        heads = heads.astype(v.dtype)[:, :, None, None]
        q, k, v = q * heads, k * heads, v * heads
    found = logits(q, k, scale=scale, bias=bias)
    p = drop(gated_softmax(found if weight is None else found + weight, policy, eps))
    y = jnp.einsum("bhqk,bhkd->bhqd", p.astype(v.dtype), v)
    return y if heads is None else y * heads, p, found


@jax.jit
def last_axis_softmax(logits: Array) -> Array:
    """A function of its own: an ONNX file has one node for it, found by this name."""
    return jax.nn.softmax(logits, axis=-1)


def attention(
    q: Array, k: Array, v: Array, *, scale: float, bias: Array | None = None, size: Array | None = None
) -> Array:
    """Unmasked attention that does not return its probabilities.

    Args:
      q, k, v: `[B, H, T, D]`.
      bias: `[B, H, T, T]`, or with some of these 1, added to the scaled logits.
      size: `[B, T]`, each key counts that often.

    Returns:
      `[B, H, T, D]`. On the CPU the normalisation comes after the value product
      (fewer divisions; the fastest exact form measured there), in an ONNX file
      there is a plain softmax; elsewhere XLA's fused attention.
    """
    if backend.platform() == "cpu":
        return weigh(logits(q, k, scale=scale, bias=bias), v, size)
    if size is not None:
        bias = log_size(size) if bias is None else bias + log_size(size)
    if backend.platform() == "onnx":
        p = last_axis_softmax(logits(q, k, scale=scale, bias=bias))
        return jnp.einsum("bhqk,bhkd->bhqd", p.astype(v.dtype), v)
    q, k, v = (jnp.swapaxes(t, 1, 2) for t in (q, k, v))
    return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, bias, scale=scale), 1, 2)


def attention_and_class(
    q: Array,
    k: Array,
    v: Array,
    prefix: int,
    *,
    scale: float,
    bias: Array | None = None,
    size: Array | None = None,
) -> tuple[Array, Array]:
    """`attention` (with its bits), and the `class_attention` to `T - prefix` patches: one row of its weights."""
    weight = None if size is None else log_size(size)
    if backend.platform() == "cpu":
        found = logits(q, k, scale=scale, bias=bias)
        y, row = weigh(found, v, size), found[:, :, :1]
    else:
        y = attention(q, k, v, scale=scale, bias=bias, size=size)
        bias = bias if bias is None or bias.shape[2] == 1 else bias[:, :, :1]
        row = logits(q[:, :, :1], k, scale=scale, bias=bias)
    row = row if weight is None else row + weight
    return y, class_attention(normalise(row, policy=None, train=False), prefix)


def weigh(logits: Array, v: Array, size: Array | None = None) -> Array:
    """`attention` from its logits `[B, H, T, T]`, as a CPU computes it: with the bits of a layer that shows none.

    Sizes are factors there: logarithms in the logits would be written out for every query, and kept for training.
    """
    p = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    p = p if size is None else p * jnp.where(size > 0, size, 1.0).astype(jnp.float32)[:, None, None, :]
    y = jnp.einsum("bhqk,bhkd->bhqd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (y / p.sum(axis=-1, keepdims=True)).astype(v.dtype)


def log_size(size: Array) -> Array:
    """What makes each key count `size [B, T]` times, to be added to logits: `[B, 1, 1, T]` float32.

    Rows of size 0 get 0: they are masked where there are any.
    """
    size = size.astype(jnp.float32)
    return jnp.log(jnp.where(size > 0, size, 1.0))[:, None, None, :]


def logits(q: Array, k: Array, *, scale: float, bias: Array | None = None) -> Array:
    """Scaled products of queries and keys, plus a bias: `[B, H, T, T]` float32."""
    products = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    return products if bias is None else products + bias.astype(jnp.float32)


def normalise(logits: Array, *, policy: Array | None, train: bool) -> Array:
    """Attention weights `[B, H, T, T]` in float32, masked by `policy` if given.

    In training a policy is applied as the references do (`policy_softmax`), in
    evaluation exactly (`masked_softmax`).
    """
    if policy is None:
        return last_axis_softmax(logits) if backend.platform() == "onnx" else jax.nn.softmax(logits, axis=-1)
    return policy_softmax(logits, policy) if train else masked_softmax(logits, policy)


def class_attention(probs: Array, prefix: int) -> Array:
    """The class token's attention to the patches, averaged over heads.

    EViT, section 3.2: `[B, T - prefix]` float32 from the softmax over all rows
    `probs [B, H, T, T]` (row 0 is the class token), not renormalised.
    """
    return probs[:, :, 0, prefix:].mean(axis=1)
