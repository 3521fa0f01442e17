"""Blocks and stages of PVT and CvT, which see rows of tokens and spatial maps.

Tokens are reduced in the first block of a stage. From there on only the
survivors have queries and an MLP; wherever a block or the next stage convolves,
they are laid out on the stage's grid again (TPS, CVPR 2023, for PVT and CvT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.nn.block import ATTENTION, ATTENTION_PATH, Block, LayerArgs
from dyntoken.nn.spec import Site, Spec
from dyntoken.nn.trunk import Context, Trunk
from dyntoken.ops import attend, sample, select
from dyntoken.types import Attended, Reduction, Tokens

Array = jax.Array


class SpatialMap(NamedTuple):
    """What a block's attention sees besides its rows."""

    cells: Array  # [B, H, W, C], the normed patches on their grid
    place: Array | None  # [B, n], cell of each patch row; None: row i is cell i


def to_map(tokens: Tokens, rows: Array, empty: Array | None = None) -> Array:
    """Patch rows on their grid.

    Args:
      tokens: after at most one reduction, none of it into a row without a cell.
      rows: `[B, n, C]`, one per patch row of `tokens`.
      empty: `[B, N0, C]`, shown where a row was dropped; None is zeros.

    Returns:
      `[B, H, W, C]`. In the mask form it is what the gather form scatters. Decisions that are
      learnt get a gradient: of all cells in the mask form, of the rows kept in the gather form.
    """
    if tokens.alive is not None:
        alive = tokens.alive[..., None].astype(rows.dtype)
        cells = rows * alive if empty is None else rows * alive + empty * (1 - alive)
    else:
        at = select.survivors(tokens.carrier, tokens.place)
        if tokens.weight is not None:  # ones, see `Tokens.weight`
            weight = tokens.weight[..., None].astype(rows.dtype)
            below = 0.0 if empty is None else select.take(empty, tokens.place) * (1 - weight)
            rows = rows * weight + below
        cells = select.gather_or_zero(rows, at)
        cells = cells if empty is None else jnp.where(at[..., None] >= 0, cells, empty)
    return cells.reshape(rows.shape[0], *tokens.grid, rows.shape[-1])


class SpatialBlock(Block):
    """A pre-norm block whose attention takes keys and values from a map of the whole grid.

    A subclass overrides `attention`: its module is called like `Attention`, with a
    `SpatialMap` as `spatial_map` and no policy where `convolves`.

    Keys that come from a map are those of the grid: dropped tokens are in them
    as empty cells, and none is masked, in either form. Without a map dropped
    tokens are no keys, as in `Block`.

    Attributes (besides those of `Block`):
      reduced: a site lies ahead of this block's attention, in its stage.
      dropped: what a dropped token's cell shows: "zero", or "last", the value
        its row had when it was dropped (then normed like any other).
    """

    reduced: bool = False
    dropped: str = "zero"

    @property
    def convolves(self) -> bool:
        """Whether the attention takes a map."""
        return True

    def attend(
        self,
        tokens: Tokens,
        draws: sample.Draws | None,
        train: bool,
        return_scores: bool,
        return_logits: bool = False,
        bias: Callable[[], Array] | None = None,
        rotation: None = None,
        layer: LayerArgs | None = None,
    ) -> tuple[Tokens, Attended | None]:
        """First half, see `Block.attend`; there are no logits per pair of rows to return or to bias."""
        layer = layer or LayerArgs(self.layer, self.drop_path)
        if return_logits or bias is not None:
            raise ValueError("keys of a stage are those of its map: there are no logits per pair of rows")
        x = self.norm1(tokens.x)
        options = {"prefix": tokens.prefix, "train": train, "return_scores": return_scores}
        if self.convolves:
            options["spatial_map"] = self._spatial_map(tokens, x[:, tokens.prefix :])
        elif tokens.alive is not None:
            options["policy"] = attend.with_prefix(tokens.alive, tokens.prefix)
        elif tokens.weight is not None:
            options["size"] = attend.with_prefix(tokens.weight, tokens.prefix)
        y, seen = self.attn(x, **options, draws=draws, path=(layer.number, ATTENTION))
        tokens = tokens.replace(x=tokens.x + self._path(y, draws, ATTENTION_PATH, layer))
        if return_scores and self.dropped == "last":
            tokens = tokens.replace(last=tokens.patches)
        return tokens, seen

    def _spatial_map(self, tokens: Tokens, rows: Array) -> SpatialMap:
        """The normed patch rows on the grid."""
        if not self.reduced:
            return SpatialMap(rows.reshape(rows.shape[0], *tokens.grid, rows.shape[-1]), None)
        empty = None if tokens.last is None else self.norm1(tokens.last)
        return SpatialMap(to_map(tokens, rows, empty), tokens.place if tokens.alive is None else None)


class RegrownStage(nn.Module):
    """One resolution: embedding, class token, positions, blocks.

    Attributes:
      embed: recipe of the module that takes a map to this stage's.
      blocks: one recipe of a `SpatialBlock` per block.
      sites: the site in block 0, or none.
      grid, width: (rows, columns) and channels of the map.
      prefix: number of class tokens, 0 or 1.
      positions: add a position embedding (to the class token, too).
      dropout: after the positions; `layer`, the number of no block, keys its draws.
      dropped, remat: see `SpatialBlock`, `Trunk`.
    """

    embed: Spec
    blocks: tuple[Spec, ...]
    sites: tuple[Site, ...]
    grid: tuple[int, int]
    width: int
    prefix: int
    positions: bool
    dropout: float
    layer: int
    dropped: str = "zero"
    remat: bool | str = False

    def setup(self) -> None:
        self.patch_embed = self.embed()
        init = layers.trunc_normal()
        self.first = [self.param("cls_token", init, (1, 1, self.width)) for _ in range(self.prefix)]
        if self.positions:
            rows = self.prefix + self.grid[0] * self.grid[1]
            self.added = self.param("pos_embed", init, (1, rows, self.width))
        self.trunk = Trunk(self.blocks, self.sites, self.remat)

    def __call__(self, x: Array, context: Context) -> tuple[Tokens, tuple[Reduction, ...], dict[str, Any]]:
        """`[B, H, W, C]` to the tokens after the last block; see `Trunk.__call__`."""
        tokens = self.embedded(self.patch_embed(x), context)
        start = {"embed": (tokens.x,)} if "embed" in context.record else {}
        if self.dropped == "last" and any(not site.inside for site in self.sites):
            tokens = tokens.replace(last=tokens.patches)
        tokens, reductions, records = self.trunk(tokens, context)
        return tokens, reductions, {**start, **records}

    def embedded(self, x: Array, context: Context) -> Tokens:
        """The map `[B, rows, columns, width]` as the tokens that enter block 0."""
        batch = x.shape[0]
        chex.assert_shape(x, (batch, *self.grid, self.width))
        first = [jnp.broadcast_to(t.astype(x.dtype), (batch, 1, self.width)) for t in self.first]
        x = jnp.concatenate([*first, x.reshape(batch, -1, self.width)], axis=1)
        x = x + self.added.astype(x.dtype) if self.positions else x
        x = layers.drop(x, self.dropout, context.dropout, self.layer)
        return Tokens.start(x, prefix=self.prefix, grid=self.grid)

    def to_next_stage(self, tokens: Tokens) -> Array:
        """The tokens of this stage as the map that the next one takes, class token left out."""
        if self.sites:
            return to_map(tokens, tokens.patches, tokens.last)
        return tokens.patches.reshape(-1, *self.grid, self.width)
