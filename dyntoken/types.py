"""The records that pass through a model: `Tokens` in, `Output` out.

A token keeps its address: at any stage `carrier` says which original patches a row
stands for, `place` where it lies on the first grid, `size` how many it absorbed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp

from dyntoken.schema import Rule

Array = jax.Array
SHORT = {"fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16"}


def float_type(value: Any) -> jnp.dtype:
    """The compute type of a name ("bfloat16", "bf16"), a numpy or jax type.

    Raises:
      ValueError: none of float32, bfloat16 and float16.
    """
    dtype = jnp.dtype(SHORT.get(value, value) if isinstance(value, str) else value)
    if value is None or dtype.name not in SHORT.values():
        raise ValueError(f"{value} is no compute type")
    return dtype


DType = Annotated[Any, Rule(float_type, "float32 (fp32), bfloat16 (bf16) or float16 (fp16)")]


@flax.struct.dataclass
class Tokens:
    """A batch of token rows, which all modules take and return.

    Attributes:
      x: `[B, prefix + N, C]`; class and distillation tokens first. They are
        never scored, dropped or merged.
      alive: `[B, N]`, 1.0 for rows in play, or None when all are (gather form).
        In training it carries the straight-through gradient of the decisions.
      place: `[B, N]` int32, row-major cell of the first grid; -1 for a row
        that stands for no single cell (EViT's fused token).
      carrier: `[B, N0]` int32, for each original patch the row (of the N, not
        counting the prefix) that carries it now; -1 if it was dropped.
      size: `[B, N]` float32, number of original patches a row stands for.
      prefix: number of leading rows that are no patches.
      grid: (rows, columns) of the first patch grid.
      weight: `[B, N]` float32, how often a row counts as a key where a method weighs keys
        otherwise than by `size`; else None. In gather-form training of a learnt decision it is
        ones, which carry its straight-through gradient.
      mixed: `[B, N0]` bool, cells whose content MixToken took from the row's
        partner (`ops.mixing`); None where nothing was mixed.
      last: `[B, N0, C]`, what a cell shows on a map once its row is dropped
        (`nn.spatial.to_map`); None for zeros.
      gate: what the blocks leave out until it is set anew; None for nothing.
      state: a pytree that a method hands on from block to block; None without.
    """

    x: Array
    alive: Array | None
    place: Array
    carrier: Array
    size: Array
    prefix: int = flax.struct.field(pytree_node=False)
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)
    mixed: Array | None = None
    last: Array | None = None
    gate: Gate | None = None
    state: Any = None
    weight: Array | None = None

    @classmethod
    def start(cls, x: Array, *, prefix: int = 1, grid: tuple[int, int] | None = None) -> Tokens:
        """The rows `x [B, prefix + N, C]` that enter the first block, on a grid (default `(1, N)`)."""
        batch, rows = x.shape[0], x.shape[1] - prefix
        height, width = (1, rows) if grid is None else grid
        if height * width != rows:
            raise ValueError(f"{rows} patch rows do not fill a grid of {(height, width)}")
        place = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[None], (batch, rows))
        return cls(
            x=x,
            alive=None,
            place=place,
            carrier=place,
            size=jnp.ones((batch, rows), jnp.float32),
            prefix=prefix,
            grid=(height, width),
        )

    @property
    def initial(self) -> int:
        """The first patch count N0, which keep ratios refer to."""
        return self.grid[0] * self.grid[1]

    @property
    def count(self) -> int:
        """Number of patch rows N, dead ones included."""
        return self.x.shape[1] - self.prefix

    @property
    def key_weight(self) -> Array:
        """`weight`, or `size` where there is none."""
        return self.size if self.weight is None else self.weight

    @property
    def patches(self) -> Array:
        """The rows without the prefix, `[B, N, C]`."""
        return self.x[:, self.prefix :]


@flax.struct.dataclass
class Gate:
    """What a block leaves out, besides rows that are gone; T rows, the prefix included.

    Each field is None where nothing is left out by it, and else 1.0 for what
    stays; all but `policy` may carry a straight-through gradient.

    Attributes:
      policy: `[B, T]` keys that attention sees, or `[B, T, T]` (query, key); it
        replaces `Tokens.alive` there.
      size: `[B, T]` how often a key counts where they do, in place of `Tokens.size`, which is 0
        for a row that is gone: the gradient of its policy asks what it would have been.
      rows: `[B, T]` rows that both branches read; the others are zero to them.
      outputs: `[B, T]` rows that both branches write.
      branches: `[B, 2]` attention and MLP.
      heads: `[B, heads]` attention heads.
      mlp_outputs: False lets all rows write the MLP's result.
      mlp_heads: the channels of dropped heads are also left out of the MLP's input.
      eps: None masks keys exactly. A number weighs them by `policy`, with its
        gradient, and adds eps / T to each weight and eps to their sum.
    """

    policy: Array | None = None
    size: Array | None = None
    rows: Array | None = None
    outputs: Array | None = None
    branches: Array | None = None
    heads: Array | None = None
    mlp_outputs: bool = flax.struct.field(pytree_node=False, default=True)
    mlp_heads: bool = flax.struct.field(pytree_node=False, default=False)
    eps: float | None = flax.struct.field(pytree_node=False, default=None)

    def reads(self, norm: Callable[[Array], Array], x: Array) -> Array:
        """What a branch reads of `x [B, T, C]` through its norm."""
        if self.rows is None:
            return norm(x)
        rows = self.rows.astype(x.dtype)[..., None]
        return norm(x * rows) * rows

    def writes(self, y: Array, branch: int) -> Array:
        """What a branch (0 attention, 1 MLP) adds to the residual stream of its result `y [B, T, C]`."""
        kept = None
        if self.outputs is not None and (branch == 0 or self.mlp_outputs):
            kept = self.outputs[..., None]
        if self.branches is not None:
            of_branch = self.branches[:, branch, None, None]
            kept = of_branch if kept is None else kept * of_branch
        return y if kept is None else y * kept.astype(y.dtype)

    def channels(self, x: Array) -> Array:
        """`x [B, T, C]` without the channels of dropped heads."""
        if self.heads is None or not self.mlp_heads:
            return x
        return x * jnp.repeat(self.heads, x.shape[-1] // self.heads.shape[1], axis=1).astype(x.dtype)[:, None]


@flax.struct.dataclass
class Reduction:
    """What one reduction site decided; n rows came in, m rows went out.

    Attributes:
      scores: `[B, n]` float32, higher is kept first; -inf for rows that were
        already dead.
      log_probs: `[B, n, 2]` (keep, drop) of a predictor, else None.
      decision: `[B, n]` 1.0 for rows alive after the site. Carries the
        straight-through gradient when it was sampled.
      keep: `[B, k]` int32 incoming rows that stay, best first (in their order
        where all do), -1 where fewer do; None where the number is sampled (Gumbel training).
      place: `[B, m]` cell of each outgoing row, -1 for a fused token.
      host: `[B, n]` cell of the row that stands for an incoming row now: its
        own if kept, its host's if squeezed, -1 if dropped or fused.
      remap: `[B, n]` int32, incoming row -> outgoing row, or -1.
      shares: `[B, m, n]`, weight of each incoming row in each outgoing one, of a method that mixes them.
      carrier: `[B, N0]`, `Tokens.carrier` after the site (filled by `Reducer`).
      queries: `[B, n]`, weight of each incoming row in the mean of its group, by
        which queries of the block's attention map fuse; the trunk takes it away.
      learnt: `[2]`, learnt numbers of rows that pruning and merging leave (DiffRate), with
        gradient; else None.
      ratio: target share of the first patches that stay, as the keep-ratio
        loss wants it.
      count: static number of rows alive after the site (fused token included).
      grid: the first patch grid.
    """

    scores: Array
    decision: Array
    place: Array
    host: Array
    remap: Array
    log_probs: Array | None = None
    keep: Array | None = None
    carrier: Array | None = None
    queries: Array | None = None
    learnt: Array | None = None
    shares: Array | None = None
    ratio: float = flax.struct.field(pytree_node=False, default=1.0)
    count: int = flax.struct.field(pytree_node=False, default=0)
    grid: tuple[int, int] = flax.struct.field(pytree_node=False, default=(0, 0))


@flax.struct.dataclass
class Attended:
    """What an attention layer shows a reducer inside its block.

    Attributes:
      cls: `[B, N]` float32, mean over heads of the class token's attention to
        each patch row (softmax over all rows, prefix columns left out, not
        renormalised), or None without a class token.
      keys, queries, values: `[B, heads, prefix + N, head_dim]`, ahead of any rotation.
      probs: `[B, heads, prefix + N, prefix + N]` float32 (query, key), softmax over
        the rows alive.
      logits: `[B, heads, prefix + N, prefix + N]` float32 (query, key), scaled,
        before the softmax and any mask; a bias that was added is included.
      normed: `[B, prefix + N, C]`, the block's first norm of the rows.
      token: `[B, C]`, the class token. A site before a block sees these two alone.
    """

    cls: Array | None = None
    keys: Array | None = None
    values: Array | None = None
    probs: Array | None = None
    logits: Array | None = None
    normed: Array | None = None
    token: Array | None = None
    queries: Array | None = None


@flax.struct.dataclass
class Upstream:
    """What one exit of a cascade hands to the next.

    Attributes:
      features: one array, or one per block: `[B, prefix + n, C]`, rows after the
        block and before the final norm; None without feature reuse.
      relations: one array, or one per block: `[B, heads, prefix + n, prefix + n]`
        float32, see `Attended.logits`; None without relation reuse.
      feature_rows, relation_rows: one entry for each of the above: for each
        patch `[B, N0]` int32, the row (of the n) to read it from, or -1 for
        zeros; None where the rows are the patches in order.
    """

    features: tuple[Array, ...] | None = None
    relations: tuple[Array, ...] | None = None
    feature_rows: tuple[Array | None, ...] | None = None
    relation_rows: tuple[Array | None, ...] | None = None


@flax.struct.dataclass
class Output:
    """What a classifier returns; `jit` removes what the caller does not use.

    Attributes:
      logits: `[B, classes]` float32 (`[B, C]` pooled features if classes = 0);
        of a cascade `[exits, B, classes]`.
      heads: `[2, B, classes]` class-token and distillation head of a distilled
        model, else None; `logits` is their mean.
      reductions: one `Reduction` per site.
      tokens: the final, normalised `Tokens` (of a cascade: one per exit); None
        unless `record=("features",)` was asked for.
      records: further arrays asked for by `record`, by name.
      dense: `[B, N, classes]` float32, auxiliary logits of the final patch rows;
        None unless `record=("dense",)` was asked for.
      mixed: `[B, N0]` bool, see `Tokens.mixed`: the part of each image whose
        target is that of the partner row; None where nothing was mixed.
      state: `Tokens.state` after the last block, for the losses of its method.
    """

    logits: Array
    heads: Array | None = None
    reductions: tuple[Reduction, ...] = ()
    tokens: Tokens | tuple[Tokens, ...] | None = None
    records: dict[str, Any] = flax.struct.field(default_factory=dict)
    dense: Array | None = None
    mixed: Array | None = None
    state: Any = None
