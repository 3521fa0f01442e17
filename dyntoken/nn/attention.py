"""Multi-head self-attention with an optional token mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.ops import attend, backend, backward, sample
from dyntoken.ops.rope import Rotation
from dyntoken.types import Attended, Gate

Array = jax.Array
CHEAP = ("keys", "queries", "values")  # what any attention has at hand, its map included or not


class Attention(nn.Module):
    """Self-attention with one fused qkv product, timm's `Attention`.

    Attributes:
      heads: number of heads; the width must be divisible by it, unless `head_dim` says their size.
      qkv_bias: bias of the qkv product; "qv" for one of queries and values alone (EVA-02, DINOv3).
      qk_scale: factor on the logits; None is head_dim ** -0.5.
      dropout: rate after the output projection.
      dtype: compute type; the softmax stays in float32.
      attn_dropout: rate on the attention weights.
      proj_bias: bias of the output projection.
      qk_norm_eps: epsilon of a LayerNorm per head on queries and keys, None for none.
      norm_eps: epsilon of a LayerNorm before the output projection, None for none.
      head_dim: channels of a head.
    """

    heads: int
    qkv_bias: bool | Literal["qv"] = True
    qk_scale: float | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32
    attn_dropout: float = 0.0
    proj_bias: bool = True
    qk_norm_eps: float | None = None
    norm_eps: float | None = None
    head_dim: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        policy: Array | None = None,
        *,
        prefix: int = 1,
        train: bool = False,
        return_scores: bool | tuple[str, ...] = False,
        return_logits: bool = False,
        bias: Array | None = None,
        size: Array | None = None,
        rotation: Rotation | None = None,
        draws: sample.Draws | None = None,
        path: tuple[int, ...] = (),
        gate: Gate | None = None,
        only_map: bool = False,
        mix: Callable[[Array], Array] | None = None,
    ) -> tuple[Array, Attended | None]:
        """Attends `x [B, T, C]` to itself.

        Args:
          policy: `[B, T]` keep mask over keys, or None.
          prefix: rows that are no patches; row 0 is the class token.
          train: applies the policy as the references train it.
          return_scores: also return what a reducer may look at: all, or these fields of `Attended`.
          return_logits: also return the logits.
          bias: `[B, heads, T, T]`, added to the scaled logits.
          size: `[B, T]`, each key counts that often (ToMe); not in the logits returned.
          rotation: turns queries and keys; reducers see the keys as they were, what is in a patch
            without where it is.
          draws, path: randomness and layer number; None switches dropout off.
          gate: what is left out; its policy replaces `policy`.
          only_map: the attention map and no values: returns None for y. A second call on other rows
            then mixes theirs:
          mix: values `[B, heads, T, head_dim]` of the rows to what they are mixed to, in
            place of attention.

        Returns:
          `(y [B, T, C], Attended or None)`.
        """
        batch, rows, width = x.shape
        each = self.head_dim or width // self.heads
        chex.assert_shape(policy, (batch, rows)) if policy is not None else None
        parts = (2,) if mix else (0, 1) if only_map else (0, 1, 2)
        q, k, v = self._projected(x, parts, each)
        if self.qk_norm_eps is not None:
            norm = functools.partial(layers.LayerNorm, epsilon=self.qk_norm_eps, dtype=self.dtype)
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        if mix is not None:
            return self._output(mix(v), width, draws, path), None
        keys, queries = k, q
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        policy = policy if gate is None or gate.policy is None else gate.policy
        scale = self.qk_scale if self.qk_scale is not None else each**-0.5
        thinned = draws is not None and self.attn_dropout > 0.0
        if only_map:
            return_scores = True
        shows = (
            set(return_scores) if isinstance(return_scores, tuple) else {"probs"} if return_scores else set()
        )
        unseen = not (shows - {*CHEAP, "cls"} or return_logits or thinned)
        seen = Attended(keys=keys, queries=queries, values=v)
        if policy is None and unseen and not (prefix and "cls" in shows):
            y = attend.attention(q, k, v, scale=scale, bias=bias, size=size)
        elif policy is gate is None and unseen:
            y, cls = attend.attention_and_class(q, k, v, prefix, scale=scale, bias=bias, size=size)
            seen = seen.replace(cls=cls)
        elif policy is not None and train and unseen and "cls" not in shows and gate is bias is size is None:
            y = attend.policy_attention(q, k, v, policy, scale=scale)
        else:

            def drop(p: Array) -> Array:
                return layers.drop(p, self.attn_dropout, draws, *path, 0)

            weight = None if size is None else attend.log_size(size)
            if gate is None:
                logits = attend.logits(q, k, scale=scale, bias=bias)
                weighed = logits if weight is None else logits + weight
                p = drop(attend.normalise(weighed, policy=policy, train=train))
                if only_map:
                    y = None
                elif policy is None and not thinned and backend.platform() == "cpu":
                    y = attend.weigh(
                        logits, v, size
                    )  # what the site does not drop leaves the dense model's bits
                else:
                    y = jnp.einsum("bhqk,bhkd->bhqd", p.astype(v.dtype), v)
            else:
                args = (q, k, v, policy, gate.heads, bias, weight)
                gated = functools.partial(attend.gated, scale=scale, eps=gate.eps, drop=drop)
                y, p, logits = backward.recomputed(gated, *args) if train else gated(*args)
            cls = attend.class_attention(p, prefix) if prefix and return_scores else None
            shown = {"keys": keys, "queries": queries, "values": v, "probs": p} if return_scores else {}
            seen = Attended(cls, **shown, logits=logits if return_logits else None)
        shown = seen if return_scores or return_logits else None
        if only_map:
            return None, shown
        return self._output(y, width, draws, path), shown

    def _projected(self, x: Array, parts: tuple[int, ...], each: int) -> list[Array]:
        """Queries, keys and values `[B, heads, T, head_dim]` of one fused layer; zeros for those not in `parts`."""
        width = self.heads * each
        dense = layers.dense(3 * width, name="qkv", dtype=self.dtype, use_bias=self.qkv_bias is True)
        bias = None
        if self.qkv_bias == "qv":
            q, v = (self.param(name, nn.initializers.zeros, (width,)) for name in ("q_bias", "v_bias"))
            bias = jnp.concatenate([q, jnp.zeros_like(q), v])
        # A TPU would copy the result of one product twice to part it, which takes longer than the product.
        if self.is_initializing() or (len(parts) == 3 and backend.platform() != "tpu"):
            y = dense(x)
            y = y if bias is None else y + bias.astype(y.dtype)[None, None]
            return [
                jnp.swapaxes(y.reshape(*x.shape[:2], self.heads, each), 1, 2)
                for y in jax.lax.split(y, (width, width, width), axis=2)
            ]
        params = dense.variables["params"]
        bias = params.get("bias", bias)
        heads = [jnp.zeros((x.shape[0], self.heads, x.shape[1], each), self.dtype)] * 3
        for part in parts:
            columns = slice(part * width, (part + 1) * width)
            y = x.astype(self.dtype) @ params["kernel"][:, columns].astype(self.dtype)
            y = y if bias is None else y + bias[None, None, columns].astype(y.dtype)
            heads[part] = jnp.swapaxes(y.reshape(*x.shape[:2], self.heads, each), 1, 2)
        return heads

    def _output(self, y: Array, width: int, draws: sample.Draws | None, path: tuple[int, ...]) -> Array:
        """Heads `[B, heads, T, head_dim]` joined and projected."""
        y = jnp.swapaxes(y, 1, 2)
        y = y.reshape(*y.shape[:2], -1)
        if self.norm_eps is not None:
            y = layers.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(y)
        y = layers.dense(width, name="proj", dtype=self.dtype, use_bias=self.proj_bias)(y)
        return layers.drop(y, self.dropout, draws, *path)
