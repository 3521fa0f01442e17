"""One pre-norm transformer block, split where a reducer may sit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.nn.attention import Attention
from dyntoken.ops import attend, sample
from dyntoken.ops.rope import Rotation
from dyntoken.types import Attended, Tokens

Array = jax.Array
# Numbers of the random streams inside a layer; the MLP numbers its own two below MLP.
ATTENTION, MLP, ATTENTION_PATH, MLP_PATH = range(4)


class LayerArgs(NamedTuple):
    """What differs between the blocks of one loop; both are traced there.

    Attributes:
      number: int32 scalar, keys the random draws.
      drop_path: float32 scalar, stochastic depth rate.
    """

    number: int | Array
    drop_path: float | Array


class Block(nn.Module):
    """`x + attention(norm1(x))`, then `x + mlp(norm2(x))`.

    The two halves are methods, so that the trunk can put a reducer before the
    block or between them; the block itself knows of none. A bias can be added to
    the attention logits, and features joined to the MLP's input.

    Attributes:
      layer: number of the block, which keys its random draws.
      heads, mlp_ratio, qkv_bias, qk_scale: as timm's.
      dropout: after the attention projection and inside the MLP.
      drop_path: stochastic depth rate of both branches.
      layer_scale: initial LayerScale value, None for none.
      norm_eps: LayerNorm epsilon (1e-6 in DeiT).
      skip_lam: what both residual branches are divided by (LV-ViT).
      context: channels of the features that `feed_forward` gets besides the tokens.
      dtype: compute type.
      attn_dropout: on the attention weights.
      proj_bias: biases of the attention projection and the MLP.
      qk_norm: a LayerNorm per head on queries and keys.
      act: activation of the MLP, see `layers.ACTIVATIONS`.
      attn_norm, mlp_norm: a LayerNorm before the last product of either branch.
      head_dim: channels of a head, None for width / heads.
      proportional: each key counts as often as `Tokens.key_weight` says, the patches it stands for.
      mlp_hidden: channels after the MLP's first layer, in place of width * mlp_ratio.
      mlp_split: the first half of these comes from a layer of its own, see `layers.Mlp`.
      half: "both", or the only one of the two halves that there is: "attention" or "mlp".
    """

    layer: int
    heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool | Literal["qv"] = True
    qk_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    norm_eps: float = 1e-6
    width: int = 0
    skip_lam: float = 1.0
    context: int = 0
    dtype: Any = jnp.float32
    attn_dropout: float = 0.0
    proj_bias: bool = True
    qk_norm: bool = False
    act: str = "gelu"
    attn_norm: bool = False
    mlp_norm: bool = False
    head_dim: int | None = None
    proportional: bool = False
    mlp_hidden: int | None = None
    mlp_split: bool = False
    half: str = "both"

    def setup(self) -> None:
        self.norm1 = layers.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)
        self.attn = self.attention()
        self.norm2 = layers.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)
        self.mlp = layers.Mlp(
            self.mlp_hidden or int(self.width * self.mlp_ratio),
            self.dropout,
            self.dtype,
            self.width,
            layers.ACTIVATIONS[self.act],
            self.proj_bias,
            self.norm_eps if self.mlp_norm else None,
            self.mlp_split,
        )
        if self.layer_scale is not None:
            self.ls1 = layers.LayerScale(self.layer_scale)
            self.ls2 = layers.LayerScale(self.layer_scale)

    def attention(self) -> nn.Module:
        """The attention layer."""
        return Attention(
            self.heads,
            self.qkv_bias,
            self.qk_scale,
            self.dropout,
            self.dtype,
            self.attn_dropout,
            self.proj_bias,
            self.norm_eps if self.qk_norm else None,
            self.norm_eps if self.attn_norm else None,
            self.head_dim,
        )

    def normed(self, tokens: Tokens) -> Array:
        """The first norm of the rows, for a reducer before the block."""
        return self.norm1(tokens.x)

    def attend(
        self,
        tokens: Tokens,
        draws: sample.Draws | None,
        train: bool,
        return_scores: bool | tuple[str, ...],
        return_logits: bool = False,
        bias: Callable[[], Array] | None = None,
        rotation: Rotation | None = None,
        layer: LayerArgs | None = None,
    ) -> tuple[Tokens, Attended | None]:
        """First half: attention over the rows alive, residual added.

        Args:
          return_scores: return what a reducer may look at: all, or these fields of `Attended`.
          return_logits: return the attention logits.
          bias: makes the `[B, heads, T, T]` that is added to them; called here,
            so that recomputing this half recomputes it.
          rotation: of its rows.
          layer: replaces the fields of these names (of `drop_path` only whether
            it is 0 counts then).
        """
        if self.half == "mlp":
            return tokens, None
        layer = layer or LayerArgs(self.layer, self.drop_path)
        policy = None if tokens.alive is None else attend.with_prefix(tokens.alive, tokens.prefix)
        gate = tokens.gate
        gated = {} if gate is None else {"gate": gate}
        counted = self.proportional or tokens.weight is not None
        more = {"size": attend.with_prefix(tokens.key_weight, tokens.prefix)} if counted else {}
        if more and gate is not None and gate.size is not None:
            more = {"size": gate.size}
        y, seen = self.attn(
            self.norm1(tokens.x) if gate is None else gate.reads(self.norm1, tokens.x),
            policy,
            **more,
            prefix=tokens.prefix,
            train=train,
            return_scores=return_scores,
            return_logits=return_logits,
            bias=None if bias is None else bias(),
            **({} if rotation is None else {"rotation": rotation}),
            draws=draws,
            path=(layer.number, ATTENTION),
            **gated,
        )
        y = self.ls1(y) if self.layer_scale is not None else y
        y = y if gate is None else gate.writes(y, 0)
        return tokens.replace(x=tokens.x + self._path(y, draws, ATTENTION_PATH, layer)), seen

    def attention_map(
        self, tokens: Tokens, train: bool, bias: Callable[[], Array] | None, rotation: Rotation | None
    ) -> Attended:
        """What `attend` would show, without its result; `attend_by` then makes that of other rows."""
        more = {"size": attend.with_prefix(tokens.key_weight, tokens.prefix)} if self.proportional else {}
        options = {"train": train, "bias": None if bias is None else bias(), "rotation": rotation}
        x = self.norm1(tokens.x)
        return self.attn(x, prefix=tokens.prefix, return_logits=True, only_map=True, **options, **more)[1]

    def attend_by(self, tokens: Tokens, draws: sample.Draws | None, mix: Callable[[Array], Array]) -> Tokens:
        """First half with values that are mixed by `mix` in place of attention, see `Attention`."""
        layer = LayerArgs(self.layer, self.drop_path)
        y, _ = self.attn(self.norm1(tokens.x), mix=mix, draws=draws, path=(layer.number, ATTENTION))
        y = self.ls1(y) if self.layer_scale is not None else y
        return tokens.replace(x=tokens.x + self._path(y, draws, ATTENTION_PATH, layer))

    def feed_forward(
        self,
        tokens: Tokens,
        draws: sample.Draws | None,
        extra: Array | None = None,
        layer: LayerArgs | None = None,
    ) -> Tokens:
        """Second half: MLP, residual added.

        Args:
          extra: `[B, T, context]`, concatenated to the MLP's input before its
            norm; the residual goes without it.
          layer: as in `attend`.
        """
        if self.half == "attention":
            return tokens
        layer = layer or LayerArgs(self.layer, self.drop_path)
        x = tokens.x
        if (extra is None) == bool(self.context):
            raise ValueError(
                f"a block with context={self.context} got {'no' if extra is None else 'some'} features"
            )
        if extra is not None:
            x = jnp.concatenate([x, extra.astype(x.dtype)], axis=-1)
        gate = tokens.gate
        x = self.norm2(x) if gate is None else gate.channels(gate.reads(self.norm2, x))
        y = self.mlp(x, draws, (layer.number, MLP))
        y = self.ls2(y) if self.layer_scale is not None else y
        y = y if gate is None else gate.writes(y, 1)
        return tokens.replace(x=tokens.x + self._path(y, draws, MLP_PATH, layer))

    def _path(self, y: Array, draws: sample.Draws | None, stream: int, layer: LayerArgs) -> Array:
        if draws is not None and self.drop_path > 0.0:
            y = sample.drop_path(y, layer.drop_path, draws, layer.number, stream)
        return y if self.skip_lam == 1.0 else y / self.skip_lam
