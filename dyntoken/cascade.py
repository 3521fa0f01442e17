"""DVT: a cascade of exits on finer and finer token grids.

Wang et al. 2021, "Not All Images are Worth 16x16 Words"
(blackfeather-wang/Dynamic-Vision-Transformer): every exit sees the whole image,
cut into more tokens than the exit before, whose features and attention logits
it reuses.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.backbones.isotropic import Isotropic, pair
from dyntoken.heads import ClassHead
from dyntoken.nn import draws as streams
from dyntoken.nn import layers
from dyntoken.nn.trunk import Context, Site, Spec
from dyntoken.ops import resample
from dyntoken.ops.sample import Draws
from dyntoken.registry import UnknownNameError, suggest
from dyntoken.types import Output, Tokens, Upstream

Array = jax.Array
Grid = tuple[int, int]
PER_EXIT = ("embed", "blocks", "relations")  # records of the trunk
RECORDS = ("features", *PER_EXIT, "context", "maps", "biases")


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
    """Mixes the attention logits of all blocks and heads, C -> 3 C -> C channels."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Array) -> Array:
        channels = maps.shape[1]
        hidden = Pointwise(3 * channels, self.dtype, name="fc1")(maps.astype(self.dtype))
        return Pointwise(channels, self.dtype, name="fc2")(layers.gelu(hidden))


class ContextMlp(nn.Module):
    """Upstream features to the context embedding of one block: `[B, N, C]` -> `[B, N, width]`."""

    hidden: int
    width: int
    norm_eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)
        x = layers.gelu(layers.dense(self.hidden, name="fc1", dtype=self.dtype)(x))
        return layers.dense(self.width, name="fc2", dtype=self.dtype)(x)


class Reuse(nn.Module):
    """What one exit takes from the exit before.

    Attributes:
      old, new: token grids of the exit before and of this one.
      depth, heads, prefix, norm_eps, dtype: of both backbones.
      context: channels of a context embedding; 0 switches feature reuse off.
      hidden: hidden channels of the MLPs that make them.
      relations: relation reuse.
      remat: recompute the relation MLP in the backward pass.
    """

    old: Grid
    new: Grid
    depth: int
    heads: int
    prefix: int
    norm_eps: float
    context: int
    hidden: int
    relations: bool
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        if self.context:
            options = (self.hidden, self.context, self.norm_eps, self.dtype)
            for layer in range(self.depth):
                setattr(self, f"context_{layer}", ContextMlp(*options))
        if self.relations:
            self.relation = (nn.remat(RelationMlp) if self.remat else RelationMlp)(self.dtype)

    def contexts(self, features: Array) -> tuple[Array, ...]:
        """Per block `[B, prefix + N, context]`; the prefix rows are zero.

        Args:
          features: `[B, prefix + N of the exit before, C]`.
        """
        found = []
        for layer in range(self.depth):
            x = getattr(self, f"context_{layer}")(features[:, self.prefix :])
            x = resample.reuse_axis(x, 1, self.old, self.new)
            found.append(jnp.pad(x, ((0, 0), (self.prefix, 0), (0, 0))))
        return tuple(found)

    def maps(self, relations: Sequence[Array]) -> tuple[Array, ...]:
        """Per block `[B, heads, T, T]`, still on the grid of the exit before.

        Args:
          relations: per block, its attention logits `[B, heads, T, T]`.
        """
        mixed = self.relation(jnp.concatenate(relations, axis=1))  # layer-major, head-minor
        return tuple(jnp.split(mixed, self.depth, axis=1))

    def bias(self, maps: Sequence[Array]) -> Callable[[int], jax.tree_util.Partial]:
        """Block number -> the block's maps as a function that resizes them.

        `() -> [B, heads, T, T]`; a block calls it inside its attention, so that
        only one block's maps exist at a time and recomputation covers them.
        """
        resize = functools.partial(resample.reuse_maps, prefix=self.prefix, old=self.old, new=self.new)
        return lambda layer: jax.tree_util.Partial(resize, maps[layer])


class Exit(nn.Module):
    """A backbone with its classifier."""

    backbone: Spec
    classes: int
    pool: str

    def setup(self) -> None:
        self.body = self.backbone(name="backbone")
        self.head = ClassHead(self.classes, self.pool)

    def __call__(self, images: Array, context: Context) -> tuple[Array, Tokens, dict[str, Any]]:
        """`(logits [B, classes], normalised tokens, records)`."""
        tokens, _, records = self.body(images, context)
        return self.head(tokens)[0], tokens, records


class Cascade(nn.Module):
    """Exits on growing token grids, each reusing the one before.

    Built by `create_model("dvt_...")`. Nothing is detached between exits, so
    training all of them trains the early ones for the late ones too.

    Attributes:
      arch: name of the backbone.
      backbone: its recipe, without the token grid.
      exits: token grid of each exit, `n` or `(rows, columns)`.
      num_classes, pool: see `heads.ClassHead`.
      feature_reuse: a context embedding, made of the features of the exit
        before, enters every MLP (section 3.2).
      relation_reuse: the attention logits of the exit before, mixed by an MLP,
        are added to those of every block (section 3.3).
      context_width, context_hidden: channels of a context embedding and of the
        MLP that makes it.
    """

    arch: str
    backbone: Spec
    exits: tuple[int | Grid, ...] = (7, 10, 14)
    num_classes: int = 1000
    pool: str = "token"
    feature_reuse: bool = True
    relation_reuse: bool = True
    context_width: int = 48
    context_hidden: int = 128

    @property
    def method(self) -> str:
        """What stands before the backbone in the model's name."""
        return "dvt"

    @property
    def at(self) -> tuple[int, ...]:
        """No block reduces tokens."""
        return ()

    def sites(self) -> tuple[Site, ...]:
        """No reduction sites."""
        return ()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        body = self.plain()
        return (*pair(body.img_size), body.in_chans)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """(rows, columns) of tokens of each exit."""
        return tuple(pair(tokens) for tokens in self.exits)

    def recipe(self, index: int) -> Spec:
        """The backbone of one exit."""
        context = self.context_width if index and self.feature_reuse else 0
        return Spec.of(
            self.backbone.make,
            **{**dict(self.backbone.options), "tokens": self.grids[index], "context": context},
        )

    def plain(self, index: int = -1) -> Isotropic:
        """The backbone of one exit as a free-standing module, to read its static properties."""
        return self.recipe(range(len(self.exits))[index])(parent=None)

    def validate(self) -> None:
        """Raises ValueError for exits that make no cascade."""
        grids = self.grids
        if not grids:
            raise ValueError("exits is empty: give the token grid of each exit, as in exits=(7, 10, 14)")
        for old, new in itertools.pairwise(grids):
            if new == old or new[0] < old[0] or new[1] < old[1]:
                raise ValueError(
                    f"exits={self.exits}: each exit needs a finer token grid than the one before"
                )
        if dict(self.backbone.options).get("distilled"):
            raise ValueError("a cascade distils from its own last exit: build it without distilled=True")
        if self.feature_reuse and min(self.context_width, self.context_hidden) < 1:
            raise ValueError(
                "context_width and context_hidden must be at least 1; feature_reuse=False needs none"
            )
        for index in range(len(grids)):
            self.plain(index).check()

    def setup(self) -> None:
        for index in range(len(self.exits)):
            setattr(self, f"exit_{index}", Exit(self.recipe(index), self.num_classes, self.pool))
            if index and (self.feature_reuse or self.relation_reuse):
                setattr(self, f"reuse_{index}", self._reuse(index))

    def _reuse(self, index: int) -> Reuse:
        body = self.plain(index)
        return Reuse(
            old=self.grids[index - 1],
            new=self.grids[index],
            depth=body.depth,
            heads=body.heads,
            prefix=body.prefix,
            norm_eps=body.norm_eps,
            context=body.context,
            hidden=self.context_hidden,
            relations=self.relation_reuse,
            remat=body.remat,
            dtype=body.dtype,
        )

    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        ids: Array | None = None,
        upto: int | None = None,
        record: Sequence[str] = (),
    ) -> Output:
        """Runs the exits 0 .. `upto`.

        Args:
          images: `[B, H, W, C]` float, normalised.
          train: training mode.
          ids: `[B]` global example indices that key every random draw.
          upto: number of the last exit that is computed (static); None runs all.
          record: "features" (`Output.tokens`: final tokens), and by name, one
            entry per exit: "embed", "blocks", "relations" (attention logits),
            "context", "maps" and "biases" (see `Reuse`).

        Returns:
          `Output` with `logits [exits, B, classes]`.
        """
        for what in record:
            if what not in RECORDS:
                raise UnknownNameError(f"unknown record {what!r}: {suggest(what, RECORDS)}")
        last = len(self.exits) - 1 if upto is None else upto
        if not 0 <= last < len(self.exits):
            raise ValueError(f"upto={upto}: this cascade has the exits 0 to {len(self.exits) - 1}")
        draws = self._draws(images, ids, train)
        logits, tokens, records, upstream = [], [], [], None
        for index in range(last + 1):
            needed = index < last
            result = self._run(index, images, upstream, train, draws, tuple(record), needed)
            logits.append(result[0])
            tokens.append(result[1])
            records.append(result[2])
            upstream = result[3]
        return Output(
            logits=jnp.stack(logits),
            tokens=tuple(tokens) if "features" in record else None,
            records={what: tuple(r[what] for r in records) for what in record if what != "features"},
        )

    def step(
        self,
        images: Array,
        upstream: Upstream | None = None,
        *,
        index: int = 0,
        train: bool = False,
        ids: Array | None = None,
    ) -> tuple[Array, Upstream]:
        """Runs one exit: `model.apply(variables, images, upstream, index=1, method="step")`.

        Args:
          images: `[B, H, W, C]`.
          upstream: what the exit before returned, for the same rows.
          index: number of the exit (static).

        Returns:
          `(logits [B, classes], what the next exit needs)`.
        """
        if (upstream is None) == (index > 0 and (self.feature_reuse or self.relation_reuse)):
            raise ValueError(
                f"exit {index} takes {'the result of the exit before' if index else 'no upstream'}"
            )
        needed = index + 1 < len(self.exits)
        draws = self._draws(images, ids, train)
        logits, _, _, upstream = self._run(index, images, upstream, train, draws, (), needed)
        return logits, upstream

    def _draws(self, images: Array, ids: Array | None, train: bool) -> Draws | None:
        ids = jnp.arange(images.shape[0], dtype=jnp.int32) if ids is None else ids
        return streams.of_dropout(self, dict(self.backbone.options), ids) if train else None

    def _run(
        self,
        index: int,
        images: Array,
        upstream: Upstream | None,
        train: bool,
        draws: Draws | None,
        record: tuple[str, ...],
        needed: bool,
    ) -> tuple[Array, Tokens, dict[str, Any], Upstream]:
        """One exit: logits, final tokens, records, and what the next one needs."""
        contexts, maps, bias = None, (), None
        if index and self.feature_reuse:
            contexts = getattr(self, f"reuse_{index}").contexts(upstream.features)
        if index and self.relation_reuse:
            reuse = getattr(self, f"reuse_{index}")
            maps = reuse.maps(upstream.relations)
            bias = reuse.bias(maps)
        relate = needed and self.relation_reuse
        context = Context(
            train=train,
            # Exits have their own draws, also where their blocks share a number.
            dropout=None if draws is None else draws.replace(key=jax.random.fold_in(draws.key, index)),
            bias=bias,
            extra=contexts,
            record=("blocks", *(r for r in record if r in PER_EXIT), *(("relations",) * relate)),
        )
        logits, tokens, found = getattr(self, f"exit_{index}")(images, context)
        upstream = Upstream(
            features=found["blocks"][-1] if needed and self.feature_reuse else None,
            relations=found["relations"] if relate else None,
        )
        found |= {"context": contexts or (), "maps": maps}
        if "biases" in record:
            found["biases"] = tuple(bias(layer)() for layer in range(len(maps)))
        return logits, tokens, found, upstream
