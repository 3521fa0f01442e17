"""What all isotropic backbones share: class token, positions, one trunk, final norm."""

from __future__ import annotations

from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from dyntoken.backbones.base import Backbone
from dyntoken.backbones.sizes import check_heads, check_images
from dyntoken.nn import layers
from dyntoken.nn.block import Block
from dyntoken.nn.spec import Spec
from dyntoken.nn.trunk import Context, Trunk
from dyntoken.ops.rope import Rope
from dyntoken.schema import Count, Positive, Rate
from dyntoken.types import Reduction, Tokens

Array = jax.Array
# Fields that a block takes from its backbone as they are.
OF_BLOCK = ("width", "heads", "mlp_ratio", "qkv_bias", "qk_scale", "dropout", "attn_dropout", "proj_bias")
OF_BLOCK += ("qk_norm", "layer_scale", "norm_eps", "skip_lam", "dtype", "attn_norm", "mlp_norm", "head_dim")
OF_BLOCK += ("mlp_hidden", "mlp_split")


class Isotropic(Backbone):
    """A stem, then blocks of one width.

    Class (and other prefix) tokens come first, then one position embedding of
    length prefix + N is added to all rows. A subclass gives the (rows, columns)
    of its `grid`, builds the modules of the stem in `setup_stem()` and runs them
    in `stem_rows(images, context)`, which returns the patch rows `[B, N, width]`;
    it may have other `prefix_rows` and `positions`.

    Attributes (besides those of `Backbone`):
      width, depth, heads, mlp_ratio, qkv_bias, qk_scale: as timm's; qkv_bias="qv" has none for keys.
      dropout: after the position embedding, attention projection and MLP.
      attn_dropout: on the attention weights.
      pos_dropout: after the position embedding, in place of `dropout`.
      proj_bias: biases of attention projection and MLP.
      qk_norm: a LayerNorm per head on queries and keys.
      activation: of the MLPs: "gelu" (erf), "gelu_tanh", "quick_gelu", "relu", "silu" or "swiglu".
      attn_norm, mlp_norm: a LayerNorm before the last product of a block's two branches.
      head_dim: channels of a head, None for width / heads.
      mlp_hidden: rows of the MLP's first layer, in place of width * mlp_ratio.
      mlp_split: with "swiglu", two first layers of half as many rows each (`fc1_g`, the gate, and `fc1_x`).
      final_norm: False hands on the last block's tokens as they are.
      drop_path: stochastic depth of the last block, or a tuple with that of each.
      drop_path_rule: "linear" from 0 (DeiT) or "constant" (TPS).
      layer_scale: initial LayerScale value, None for none.
      skip_lam: what the residual branches are divided by.
      context: channels that something outside concatenates before each MLP,
        one number or one per block.
      scan: run the blocks between two sites as one loop: same parameters and
        results, a shorter compilation, see `nn.scan`.
    """

    width: Count = 384
    depth: Count = 12
    heads: Count = 6
    mlp_ratio: Positive = 4.0
    qkv_bias: bool | Literal["qv"] = True
    qk_scale: Positive | None = None
    dropout: Rate = 0.0
    attn_dropout: Rate = 0.0
    pos_dropout: Rate | None = None
    proj_bias: bool = True
    qk_norm: bool = False
    activation: Literal[tuple(layers.ACTIVATIONS)] = "gelu"
    attn_norm: bool = False
    mlp_norm: bool = False
    head_dim: Count | None = None
    mlp_hidden: Count | None = None
    mlp_split: bool = False
    final_norm: bool = True
    drop_path: Rate | tuple[Rate, ...] = 0.0
    drop_path_rule: Literal["linear", "constant"] = "linear"
    layer_scale: float | None = None
    skip_lam: Positive = 1.0
    context: int | tuple[int, ...] = 0
    scan: bool = False

    required = ("grid", "setup_stem", "stem_rows")
    one_width = True

    @property
    def taps(self) -> int:
        """Number of blocks."""
        return self.depth

    @property
    def default_sites(self) -> tuple[int, ...]:
        """Three sites at the quarters of the depth: (3, 6, 9) of 12 blocks."""
        return tuple(sorted({self.depth * q // 4 for q in (1, 2, 3)}))

    @property
    def prefix_rows(self) -> dict[str, int]:
        """Parameters of the rows that are no patches, in order, and how many rows each has."""
        return {"cls_token": 1}

    @property
    def prefix(self) -> int:
        """Rows that are no patches."""
        return sum(self.prefix_rows.values())

    def check(self) -> None:
        super().check()
        if self.head_dim is None:
            check_heads((self.width,), (self.heads,))
        if self.mlp_split and (self.activation != "swiglu" or self._hidden() % 2):
            raise ValueError("mlp_split needs activation='swiglu' and an even number of hidden channels")
        if isinstance(self.drop_path, tuple) and len(self.drop_path) != self.path_count:
            raise ValueError(f"drop_path={self.drop_path} needs one rate per block ({self.path_count})")

    def _hidden(self) -> int:
        return self.mlp_hidden or int(self.width * self.mlp_ratio)

    @property
    def path_count(self) -> int:
        """Number of blocks that stochastic depth is counted over."""
        return self.depth

    def path_rate(self, index: int) -> float:
        """Stochastic depth of one of them."""
        if isinstance(self.drop_path, tuple):
            return self.drop_path[index]
        if self.drop_path_rule == "constant":
            return self.drop_path
        return self.drop_path * index / max(1, self.path_count - 1)

    @property
    def position_prefix(self) -> int:
        """Rows of the position embedding that are the prefix's: all of its or none."""
        return self.prefix

    def positions_of(self, path: str) -> tuple[int, tuple[int, int]]:
        return self.position_prefix, self.grid

    def positions(self) -> Array | None:
        """The position embedding `[1, position_prefix + N, width]`, or None; called once, in `setup`."""
        rows = self.position_prefix + self.grid[0] * self.grid[1]
        return self.param("pos_embed", layers.trunc_normal(), (1, rows, self.width))

    def rotary(self) -> Rope | None:
        """The rotary position embedding of its blocks, None for none."""
        return None

    def setup(self) -> None:
        self.setup_stem()
        init = layers.trunc_normal()
        self.first = [self.param(name, init, (1, n, self.width)) for name, n in self.prefix_rows.items()]
        self.added = self.positions()
        blocks = tuple(self._block(i) for i in range(self.depth))
        self.trunk = Trunk(blocks, self.sites, self.remat, self.scan, self.rotary())
        self.norm = self.make_norm() if self.final_norm else lambda x: x

    def _block(self, index: int) -> Spec:
        return Spec.of(
            Block,
            layer=index,
            drop_path=self.path_rate(index),
            context=self.context if isinstance(self.context, int) else self.context[index],
            act=self.activation,
            **{name: getattr(self, name) for name in OF_BLOCK},
        )

    def embed(self, images: Array, context: Context) -> Tokens:
        """Images `[B, H, W, in_chans]` to the tokens that enter block 0."""
        check_images(images, self.img_size, self.in_chans)
        x = self.stem_rows(images.astype(self.dtype), context)
        batch = x.shape[0]
        first = [jnp.broadcast_to(t.astype(x.dtype), (batch, *t.shape[1:])) for t in self.first]
        bare = self.position_prefix < self.prefix
        if bare and self.added is not None:
            x = x + self.added.astype(x.dtype)
        x = jnp.concatenate([*first, x], axis=1)
        if self.added is not None:
            # Layer number `depth` keys the draw: no block uses it.
            rate = self.dropout if self.pos_dropout is None else self.pos_dropout
            x = x if bare else x + self.added.astype(x.dtype)
            x = layers.drop(x, rate, context.dropout, self.depth)
        return Tokens.start(x, prefix=self.prefix, grid=self.grid)

    def __call__(
        self, images: Array, context: Context
    ) -> tuple[Tokens, tuple[Reduction, ...], dict[str, Any]]:
        """Runs stem, trunk and final norm; returns tokens, one `Reduction` per site, records by name."""
        tokens = self.embed(images, context)
        chex.assert_shape(
            tokens.x, (*tokens.place.shape[:1], self.prefix + tokens.place.shape[1], self.width)
        )
        embed = {"embed": tokens.x} if "embed" in context.record else {}
        tokens, reductions, records = self.trunk(tokens, context)
        return tokens.replace(x=self.norm(tokens.x)), reductions, {**embed, **records}
