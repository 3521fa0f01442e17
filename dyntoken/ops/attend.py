"""Attention with token masks, as DynamicViT trains it and as pruning means it.

Shapes: B batch, H heads, T rows (prefix + patches), D head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dyntoken.ops import backend

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


@jax.jit
def last_axis_softmax(logits: Array) -> Array:
    """A function of its own: an ONNX file has one node for it, found by this name."""
    return jax.nn.softmax(logits, axis=-1)


def attention(q: Array, k: Array, v: Array, *, scale: float, bias: Array | None = None) -> Array:
    """Unmasked attention that does not return its probabilities.

    Args:
      q, k, v: `[B, H, T, D]`.
      bias: `[B, H, T, T]`, or with some of these 1, added to the scaled logits.

    Returns:
      `[B, H, T, D]`. On the CPU the normalisation comes after the value product
      (fewer divisions; the fastest exact form measured there), in an ONNX file
      there is a plain softmax; elsewhere XLA's fused attention.
    """
    if backend.platform() == "onnx":
        p = last_axis_softmax(logits(q, k, scale=scale, bias=bias))
        return jnp.einsum("bhqk,bhkd->bhqd", p.astype(v.dtype), v)
    if backend.platform() == "cpu":
        return weigh(logits(q, k, scale=scale, bias=bias), v)
    q, k, v = (jnp.swapaxes(t, 1, 2) for t in (q, k, v))
    return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, bias, scale=scale), 1, 2)


def weigh(logits: Array, v: Array) -> Array:
    """`attention` from its logits `[B, H, T, T]`, as a CPU computes it: with the bits of a layer that shows none."""
    p = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
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
