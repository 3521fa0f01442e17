"""The stack of blocks with reducers at their sites.

One forward pass of a ViT: who calls what, and where it is.

    models.Model.__call__                images [B, H, W, C] to an Output
      classifier.Classifier._context     this batch's draws (nn/rng.py), what to record: a Context
      backbones/isotropic.Isotropic      the body: stem, trunk, final norm
        .embed                           stem (backbones/vit.py), class token, positions: Tokens
        nn/trunk.Trunk.__call__          for each block (with scan=True alike ones in one loop, nn/scan.py)
          reducers/base.Reducer            a site before the block: score, select, fuse
          nn/block.Block.attend            norm, nn/attention.Attention (ops/attend.py), residual
          reducers/base.Reducer            a site inside the block: sees what attention shows (Attended)
          nn/block.Block.feed_forward      norm, nn/layers.Mlp, residual
          reducers/base.Reducer.follow     only of a method that follows every block (Evo-ViT, A-ViT)
      heads.ClassHead                    pool, logits

A reducer scores (reducers/score.py), selects (ops/select.py) and fuses (ops/fuse.py). PVT and CvT
run one trunk per stage (backbones/staged_regrown.py, nn/spatial.py); Swin and ConvNeXt have none:
their cells stay and take one of two paths (backbones/staged_dual_path.py, nn/dual_path.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import scan
from dyntoken.nn.block import Block
from dyntoken.nn.remat import rematerialised
from dyntoken.nn.spec import Site, Spec
from dyntoken.ops import backend, merge, sample, select
from dyntoken.ops.rope import Rope, Rotation
from dyntoken.types import Attended, Reduction, Tokens

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Context:
    """What one forward pass hands to every layer.

    Attributes:
      train: training mode.
      dropout: draws for dropout and stochastic depth; None switches them off.
      policy: draws for scorers and Gumbel noise.
      noise: per site, replaces the Gumbel draws (`[B, n, 2]`).
      decisions: per site, `[B, n]` 0/1, replaces the site's own choice.
      bias: layer number -> a pytree function without arguments that makes the
        `[B, heads, T, T]` added to that layer's attention logits.
      extra: per layer `[B, T, context]`, features before its MLP, or None for
        none. Both are over all rows; after a site each token takes its own.
      record: what to keep besides the output ("embed", "blocks", "stages",
        "relations", "addresses").
      taps: numbers of the blocks (of a staged backbone: of its stages) whose
        `Tokens` are kept, as the record "taps", by number.
    """

    train: bool = False
    dropout: sample.Draws | None = None
    policy: sample.Draws | None = None
    noise: Sequence[Array] | None = None
    decisions: Sequence[Array] | None = None
    bias: Callable[[int], Callable[[], Array]] | None = None
    extra: Sequence[Array | None] | None = None
    record: tuple[str, ...] = ()
    taps: tuple[int, ...] = ()

    def at_site(self, number: int) -> dict[str, Any]:
        """What the reducer of a site is called with besides tokens."""
        noise = None if self.noise is None else self.noise[number]
        decision = None if self.decisions is None else self.decisions[number]
        return {"draws": self.policy, "noise": noise, "decision": decision}


class Address(NamedTuple):
    """Where patches are after a reduction: `carrier [B, N0]` and `place [B, n]` of `Tokens`."""

    carrier: Array
    place: Array


class Trunk(nn.Module):
    """Runs blocks and the reducers at their sites.

    Attributes:
      blocks: one recipe of a `Block` per layer.
      sites: at most one per block, in order.
      remat: recompute each block's halves in the backward pass (never a reducer);
        True, or what to keep, see `nn.remat.POLICIES`. On a CPU alike blocks between two sites, in a loop.
      scan: run alike blocks between two sites as one loop: the same numbers from
        a smaller program. A block that holds a reducer stands alone.
      rope: a rotary position embedding of queries and keys, the same in all blocks.
    """

    blocks: tuple[Spec, ...]
    sites: tuple[Site, ...] = ()
    remat: bool | str = False
    scan: bool = False
    rope: Rope | None = None

    def setup(self) -> None:
        for index, spec in enumerate(self._recipes()):
            make = _rematerialised(spec.make, self.remat)
            setattr(self, f"blocks_{index}", dataclasses.replace(spec, make=make)())
        for stage, site in enumerate(self.sites):
            setattr(self, f"reducer_{stage}", site.reducer(stage=stage))

    def _recipes(self) -> tuple[Spec, ...]:
        """The recipes of the blocks; behind a site that says so keys count by size."""
        made = [(site, site.reducer(parent=None)) for site in self.sites]
        behind = [s.at + int(s.inside and r.ahead != "rows") for s, r in made if r.proportional]
        first = min(behind, default=len(self.blocks))
        return (*self.blocks[:first], *(spec.with_(proportional=True) for spec in self.blocks[first:]))

    def __call__(
        self, tokens: Tokens, context: Context, some: range | None = None
    ) -> tuple[Tokens, tuple[Reduction, ...], dict[str, Any]]:
        """Runs the stack.

        Args:
          some: the blocks to run (static); by default all of them.

        Returns:
          The tokens after the last block, one `Reduction` per site, and the records
          asked for: "blocks" (rows after each block), "stages" (rows before and
          after each site), "relations" (attention logits `[B, heads, T, T]` per
          block), "addresses" (per block the `Address` of the rows in its attention
          and in its MLP, None ahead of the first site), and "taps".
        """
        reductions: list[Reduction] = []
        stages, rows, relations, addresses = [], [], [], []
        taps: dict[int, Tokens] = {}
        return_logits = "relations" in context.record
        seen = None
        stage_at = {site.at: stage for stage, site in enumerate(self.sites)}
        if context.train and self._masks():
            # The references run every block under the policy softmax, also those before the first site.
            tokens = tokens.replace(alive=jnp.ones(tokens.place.shape, jnp.float32))
        for run in self._runs(range(len(self.blocks)) if some is None else some, context):
            index = run[0]
            stage = stage_at.get(index)
            site = None if stage is None else self.sites[stage]
            before = tokens.x
            if site is not None and not site.inside:
                seen = self._ahead(index, stage, tokens, seen)
                tokens, reduction = self._reduce(stage, tokens, seen, context)
                reductions.append(reduction)
                stages.append((before, tokens.x))
            if len(run) > 1:
                address = tuple(self._address(index, tokens, after_mlp=after) for after in (False, True))
                addresses.extend([address] * len(run))
                tokens, run_rows, run_logits = self._loop(run, tokens, context)
                rows.extend(run_rows)
                relations.extend(run_logits)
                taps[run[-1]] = tokens
                continue
            block = getattr(self, f"blocks_{index}")
            inside = site is not None and site.inside
            recalled = index + 1 in self._recalling()
            reducer = getattr(self, f"reducer_{stage}") if inside else None
            bias, rotation = self._bias(index, tokens, context), self._rotation(index, tokens)
            address = self._address(index, tokens, after_mlp=False)
            if inside and reducer.ahead in ("map", "rows"):
                seen = block.attention_map(tokens, context.train, bias, rotation)
                tokens, reduction = self._reduce(stage, tokens, seen, context)
                reductions.append(reduction.replace(queries=None))
                stages.append((before, tokens.x))
                tokens = self._attend_reduced(index, tokens, seen, reduction, context)
            else:
                shown = recalled or (reducer.needs or True if inside else self._watched())
                options = (context.train, shown, return_logits, bias, rotation)
                tokens, seen = block.attend(tokens, context.dropout, *options)
            relations.append(seen.logits if return_logits else None)
            if inside and reducer.ahead is None:
                before = tokens.x
                tokens, reduction = self._reduce(stage, tokens, seen, context)
                reductions.append(reduction)
                stages.append((before, tokens.x))
            addresses.append((address, self._address(index, tokens, after_mlp=True)))
            tokens = block.feed_forward(tokens, context.dropout, self._extra(index, tokens, context))
            if inside and reducer.ahead == "end":
                before = tokens.x
                tokens, reduction = self._reduce(stage, tokens, seen, context)
                reductions.append(reduction)
                stages.append((before, tokens.x))
            rows.append(tokens.x)
            taps[index] = tokens
            if self._follows():
                last = index + 1 == len(self.blocks)
                tokens = self.reducer_0.follow(
                    tokens, seen, block=index, closes=last or index + 1 in stage_at, last=last
                )
        records = {
            "blocks": tuple(rows),
            "stages": tuple(stages),
            "relations": tuple(relations),
            "addresses": tuple(addresses),
        }
        records = {k: v for k, v in records.items() if k in context.record}
        if context.taps:
            records["taps"] = {number: taps[number] for number in context.taps if number in taps}
        return tokens, tuple(reductions), records

    def _attend_reduced(
        self, index: int, tokens: Tokens, seen: Attended, reduction: Reduction, context: Context
    ) -> Tokens:
        """The attention of a block whose rows were reduced by its own map: by that map, fused, or anew."""
        block = getattr(self, f"blocks_{index}")
        if reduction.queries is None:
            bias = self._bias(index, tokens, context, moved=True)
            options = (context.train, False, False, bias, self._rotation(index, tokens, moved=True))
            return block.attend(tokens, context.dropout, *options)[0]
        mix = functools.partial(_mix, probs=seen.probs, reduction=reduction, prefix=tokens.prefix)
        return block.attend_by(tokens, context.dropout, mix)

    def _runs(self, numbers: range, context: Context) -> list[tuple[int, ...]]:
        """Block numbers, grouped by loop; a tapped block ends its loop, which then keeps no other rows."""
        # On a CPU only what is computed in a loop can be computed again, see `rematerialised`.
        loops = self.scan or (bool(self.remat) and context.train and backend.platform() == "cpu")
        # Each block makes its own parameters; a method that follows the blocks looks at each.
        if not loops or self.is_initializing() or self._follows():
            return [(index,) for index in numbers]
        cuts = [at for site in self.sites for at in (site.at, site.at + int(site.inside))]
        cuts += [at - ahead for at in self._recalling() for ahead in (0, 1)]
        cuts += [number + 1 for number in context.taps]
        return scan.runs(self._recipes(), cuts, numbers)

    def _recalling(self) -> list[int]:
        """Blocks whose site reads what the block before showed."""
        return [site.at for s, site in enumerate(self.sites) if getattr(self, f"reducer_{s}").recalls]

    def _loop(
        self, run: tuple[int, ...], tokens: Tokens, context: Context
    ) -> tuple[Tokens, tuple[Array, ...], tuple[Array | None, ...]]:
        """The blocks of a run, see `scan.run_blocks`."""
        params = self.variables["params"]
        return scan.run_blocks(
            _rematerialised(self.blocks[run[0]].make, self.remat, looped=True),
            [self._recipes()[index] for index in run],
            [params[f"blocks_{index}"] for index in run],
            tokens,
            draws=context.dropout,
            train=context.train,
            bias=[self._bias(index, tokens, context) for index in run],
            rotation=self._rotation(run[0], tokens),
            extra=[self._extra(index, tokens, context) for index in run],
            records=scan.Records("blocks" in context.record, "relations" in context.record),
        )

    def _reduced(self, index: int, *, after_mlp: bool) -> bool:
        """Whether a site lies ahead of the attention of a block, or of its MLP (`after_mlp`)."""
        return any(
            site.at < index or (site.at == index and (after_mlp or not site.inside)) for site in self.sites
        )

    def _address(self, index: int, tokens: Tokens, *, after_mlp: bool) -> Address | None:
        return Address(tokens.carrier, tokens.place) if self._reduced(index, after_mlp=after_mlp) else None

    def _bias(
        self, index: int, tokens: Tokens, context: Context, moved: bool = False
    ) -> Callable[[], Array] | None:
        """The bias of a block, for the rows it has."""
        bias = None if context.bias is None else context.bias(index)
        if bias is None or not (moved or self._reduced(index, after_mlp=False)):
            return bias
        # A pytree, so that recomputing the attention takes its arrays as inputs.
        rows, new = self._rows(tokens)
        return jax.tree_util.Partial(_bias_with(new), bias, rows)

    def _rotation(self, index: int, tokens: Tokens, moved: bool = False) -> Rotation | None:
        """The rotation of the rows that a block has: a kept token keeps its own."""
        if self.rope is None:
            return None
        whole = self.rope.whole(tokens.grid, tokens.prefix)
        moved = moved or self._reduced(index, after_mlp=False) or tokens.count != tokens.initial
        return whole.of(*self._rows(tokens)) if moved else whole

    def _extra(self, index: int, tokens: Tokens, context: Context) -> Array | None:
        """The extra features of a block, for the rows it has."""
        extra = None if context.extra is None else context.extra[index]
        if extra is None or not self._reduced(index, after_mlp=True):
            return extra
        rows, new = self._rows(tokens)
        return _of_rows(extra, rows, new, axes=(1,))

    def _rows(self, tokens: Tokens) -> tuple[Array | None, int]:
        """Where `tokens` are among the rows of all patches: `[B, prefix + n]`, -1 for a fused row.

        In mask form rows of most methods stay where they are: None, and the number of fused rows after them.
        """
        if tokens.alive is not None and not any(site.reducer(parent=None).moves for site in self.sites):
            return None, tokens.count - tokens.initial
        return select.shift_past_prefix(tokens.place, tokens.prefix), 0

    def _masks(self) -> bool:
        reducers = [getattr(self, f"reducer_{stage}") for stage in range(len(self.sites))]
        masks = any(reducer.resolved(True) == "mask" and not reducer.gates for reducer in reducers)
        return masks or any(reducer.bounded for reducer in reducers)

    def _follows(self) -> bool:
        return bool(self.sites) and self.reducer_0.follows

    def _watched(self) -> tuple[str, ...] | bool:
        return (self.reducer_0.watches or False) if self._follows() else False

    def _ahead(self, index: int, stage: int, tokens: Tokens, seen: Attended | None) -> Attended | None:
        """What a reducer before a block sees: what the block before showed, and what this one would read."""
        if not getattr(self, f"reducer_{stage}").needs:
            return seen
        fields = {"normed": getattr(self, f"blocks_{index}").normed(tokens), "token": tokens.x[:, 0]}
        return (seen or Attended()).replace(**fields)

    def _reduce(
        self, stage: int, tokens: Tokens, seen: Attended | None, context: Context
    ) -> tuple[Tokens, Reduction]:
        reducer = getattr(self, f"reducer_{stage}")
        return reducer(tokens, seen, context.train, **context.at_site(stage))


def _mix(values: Array, *, probs: Array, reduction: Reduction, prefix: int) -> Array:
    """Values `[B, heads, T', D]` of fused rows by the map of those that fused, `[B, heads, T, T]`.

    The keys of a group are summed, its queries averaged by `Reduction.queries`. Both are done on
    the vectors on either side of the map, which stays as it is.
    """
    batch, heads, _, each = values.shape
    rows = select.shift_past_prefix(reduction.remap, prefix)
    spread = jnp.take_along_axis(values, rows[:, None, :, None], axis=2)
    y = jnp.einsum("bhqk,bhkd->bqhd", probs.astype(values.dtype), spread)
    matching = merge.of_remap(reduction.keep, reduction.remap)
    patches = y[:, prefix:].reshape(batch, -1, heads * each)
    patches = merge.mean(patches, matching, reduction.queries).reshape(batch, -1, heads, each)
    return jnp.moveaxis(jnp.concatenate([y[:, :prefix], patches], axis=1), 1, 2)


def _of_rows(x: Array, rows: Array | None, new: int, axes: tuple[int, ...]) -> Array:
    """`x` at the rows of `_rows` along some axes, zeros for fused ones."""
    if rows is None:
        return jnp.pad(x, [(0, new if axis in axes else 0) for axis in range(x.ndim)]) if new else x
    for axis in axes:
        x = select.gather_or_zero(x, rows, axis)
    return x


@functools.cache  # equal functions are one object: blocks that share it have pytrees of one structure
def _bias_with(new: int) -> Callable[..., Array]:
    return functools.partial(_bias_of_rows, new=new)


def _bias_of_rows(bias: Callable[[], Array], rows: Array | None, *, new: int) -> Array:
    return _of_rows(bias(), rows, new, axes=(2, 3))


def _rematerialised(block: type[Block], remat: bool | str, *, looped: bool = False) -> type[Block]:
    """`block` with each half recomputed in the backward pass (train, return_scores, return_logits are static)."""
    half = rematerialised(block, remat, method="feed_forward", looped=looped)
    return rematerialised(half, remat, method="attend", static=(3, 4, 5), looped=looped)
