"""What an exit of a cascade takes from the exit before: features and relations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.nn.remat import rematerialised
from dyntoken.ops import resample, select

Array = jax.Array
Grid = tuple[int, int]
# Fields of a cascade that it hands on as they are.
OF_CASCADE = ("context_hidden", "feature_class_token", "feature_norm", "relation_reuse", "relation_source")
OF_CASCADE += ("relation_mixer", "relation_resize", "relation_chunks")


class Pointwise(nn.Module):
    """A 1x1 convolution over the channels of maps: `[B, C, T, T]` -> `[B, features, T, T]`."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[1]
        init = layers.torch_uniform(channels)
        kernel = self.param("kernel", init, (channels, self.features)).astype(self.dtype)
        bias = self.param("bias", init, (self.features,)).astype(self.dtype)
        # Channels stay in front: one product per image, no transposition of the maps.
        y = jnp.einsum("cd,bcn->bdn", kernel, x.reshape(*x.shape[:2], -1)) + bias[None, :, None]
        return y.reshape(x.shape[0], self.features, *x.shape[2:])


class RelationMlp(nn.Module):
    """Mixes the attention logits of blocks and heads, C -> 3 C -> C channels."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Array) -> Array:
        channels = maps.shape[1]
        hidden = Pointwise(3 * channels, self.dtype, name="fc1")(maps.astype(self.dtype))
        return Pointwise(channels, self.dtype, name="fc2")(layers.gelu(hidden))


class RelationLinear(nn.Module):
    """One linear layer in place of `RelationMlp`, C -> C channels."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Array) -> Array:
        return Pointwise(maps.shape[1], self.dtype, name="fc")(maps.astype(self.dtype))


MIXERS = {"mlp": RelationMlp, "linear": RelationLinear}


class ContextMlp(nn.Module):
    """Upstream features to the context embedding of one block: `[B, N, C]` -> `[B, N, width]`."""

    hidden: int
    width: int
    norm_eps: float
    dtype: Any = jnp.float32
    normalise: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.normalise:
            x = layers.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)
        x = layers.gelu(layers.dense(self.hidden, name="fc1", dtype=self.dtype)(x))
        return layers.dense(self.width, name="fc2", dtype=self.dtype)(x)


class Reuse(nn.Module):
    """What one exit takes from the exit before.

    Attributes (`OF_CASCADE`: see `Cascade`):
      old, new: token grids of the exit before and of this one.
      heads, prefix, norm_eps, dtype: of both backbones.
      context: channels of the context embedding of each block, 0 for none.
      remat: recompute the relation MLP in the backward pass, see `nn.remat`.
    """

    old: Grid
    new: Grid
    heads: int
    prefix: int
    norm_eps: float
    context: tuple[int, ...]
    context_hidden: int
    feature_class_token: bool
    feature_norm: bool
    relation_reuse: bool
    relation_source: str
    relation_mixer: str
    relation_resize: str
    relation_chunks: int
    remat: bool | str = False
    dtype: Any = jnp.float32

    @property
    def depth(self) -> int:
        """Blocks of a backbone."""
        return len(self.context)

    def setup(self) -> None:
        for layer, width in enumerate(self.context):
            if width:
                options = (self.context_hidden, width, self.norm_eps, self.dtype, self.feature_norm)
                setattr(self, f"context_{layer}", ContextMlp(*options))
        if not self.relation_reuse:
            return
        make = rematerialised(MIXERS[self.relation_mixer], self.remat, looped=self.relation_chunks > 1)
        if self.relation_source == "all":
            self.relation = make(self.dtype)
        else:
            for layer in range(self.depth):
                setattr(self, f"relation_{layer}", make(self.dtype))

    def contexts(self, features: Sequence[Array], rows: Sequence[Array | None]) -> tuple[Array | None, ...]:
        """Per block `[B, prefix + N, context]`, or None for a block that gets none.

        The prefix rows are zero unless `feature_class_token`.

        Args:
          features: `[B, prefix + n, C]` of the exit before, one for all blocks or
            one per block.
          rows: for each of them, `Upstream.feature_rows`.
        """
        return tuple(
            self._context(layer, *_of_layer(layer, features, rows)) if width else None
            for layer, width in enumerate(self.context)
        )

    def _context(self, layer: int, features: Array, rows: Array | None) -> Array:
        first = 0 if self.feature_class_token else self.prefix
        x = features[:, first:]
        if rows is not None:  # one more row, for patches that nothing carries
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
        x = getattr(self, f"context_{layer}")(x)
        head, cells = x[:, : self.prefix - first], x[:, self.prefix - first :]
        if rows is not None:
            # Embedded first, spread over the patches then: fewer rows for the MLP.
            cells = select.take(cells, jnp.where(rows >= 0, rows, cells.shape[1] - 1))
        cells = resample.reuse_axis(cells, 1, self.old, self.new)
        if self.feature_class_token:
            return jnp.concatenate([head, cells], axis=1)
        return jnp.pad(cells, ((0, 0), (self.prefix, 0), (0, 0)))

    def maps(self, relations: Sequence[Array], rows: Sequence[Array | None]) -> tuple[Array, ...]:
        """Per block `[B, heads, T, T]`, still on the grid of the exit before.

        Args:
          relations: attention logits `[B, heads, t, t]` of every block, or of the
            last one only.
          rows: for each of them, `Upstream.relation_rows`.
        """
        whole = [
            r if index is None else select.read_maps(r, select.shift_past_prefix(index, self.prefix))
            for r, index in zip(relations, rows, strict=True)
        ]
        if self.relation_source == "all":
            mixed = self._mix(self.relation, whole)  # layer-major, head-minor
            return tuple(jnp.split(mixed, self.depth, axis=1))
        return tuple(
            self._mix(getattr(self, f"relation_{layer}"), _of_layer(layer, whole))
            for layer in range(self.depth)
        )

    def _mix(self, mixer: nn.Module, maps: Sequence[Array]) -> Array:
        """Runs `mixer` on the maps `[B, heads, T, T]`, side by side on channels, in pieces of query rows."""
        if self.relation_chunks == 1:
            return mixer(jnp.concatenate(maps, axis=1))
        queries = maps[0].shape[2]
        piece = max(1, queries // self.relation_chunks)
        pieces = queries // piece

        def body(mixer: nn.Module, carry: tuple[()], rows: Sequence[Array]) -> tuple[tuple[()], Array]:
            return carry, mixer(jnp.concatenate(rows, axis=1))

        scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False})
        whole = pieces * piece
        _, mixed = scan(mixer, (), [_split_rows(m[:, :, :whole], pieces) for m in maps])
        mixed = jnp.moveaxis(mixed, 0, 2)  # [B, C, pieces, piece, T]
        mixed = mixed.reshape(*mixed.shape[:2], whole, queries)
        if whole == queries:
            return mixed
        rest = mixer(jnp.concatenate([m[:, :, whole:] for m in maps], axis=1))
        return jnp.concatenate([mixed, rest], axis=2)

    def bias(self, maps: Sequence[Array]) -> Callable[[int], jax.tree_util.Partial]:
        """Block number -> the block's maps as a function that resizes them.

        `() -> [B, heads, T, T]`; a block calls it inside its attention, so that
        only one block's maps exist at a time and recomputation covers them.
        """
        old, new = self.old, self.new
        if self.relation_resize == "flat":
            old, new = (1, old[0] * old[1]), (1, new[0] * new[1])
        resize = functools.partial(resample.reuse_maps, prefix=self.prefix, old=old, new=new)
        return lambda layer: jax.tree_util.Partial(resize, maps[layer])


def _of_layer(layer: int, *lists: Sequence[Any]) -> list[Any]:
    """The entry of one block in each list; a list of one serves all blocks."""
    return [entries[layer if len(entries) > 1 else 0] for entries in lists]


def _split_rows(x: Array, pieces: int) -> Array:
    """`[B, heads, pieces * piece, T]` to `[pieces, B, heads, piece, T]`."""
    batch, heads, _, columns = x.shape
    return jnp.moveaxis(x.reshape(batch, heads, pieces, -1, columns), 2, 0)
