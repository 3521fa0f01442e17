"""Swin and ConvNeXt: stages of shrinking grids whose cells stay and take one of two paths."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.backbones.base import Backbone
from dyntoken.backbones.sizes import check_images, check_multiple, pair
from dyntoken.nn.dual_path import Route, Streams
from dyntoken.nn.remat import rematerialised
from dyntoken.nn.spec import Site, Spec
from dyntoken.nn.trunk import Context
from dyntoken.schema import Count, Size
from dyntoken.types import Reduction, Tokens

Array = jax.Array
SPARSE_STAGE = 2  # index of the stage whose cells a method tells apart


class DualPathStage(nn.Module):
    """Blocks on one grid, with reducers at their sites.

    No cell leaves: from the first site on a block sends those that are not kept
    through its fast path (`nn.dual_path`), which earlier blocks do not have.

    Attributes:
      blocks: one recipe of a block per layer; it takes `(x [B, N, C] or Streams,
        draws, Route or None)` and has a field `fast`.
      grid: (rows, columns) of cells.
      sites: in order.
      predictor_eps: LayerNorm epsilon of learnt scorers.
      remat: recompute each block in the backward pass, see `nn.remat.POLICIES`.
    """

    blocks: tuple[Spec, ...]
    grid: tuple[int, int]
    sites: tuple[Site, ...] = ()
    predictor_eps: float = 1e-5
    remat: bool | str = False

    def setup(self) -> None:
        first = self.sites[0].at if self.sites else len(self.blocks)
        for index, spec in enumerate(self.blocks):
            make = rematerialised(spec.make, self.remat)
            setattr(self, f"blocks_{index}", dataclasses.replace(spec, make=make)(fast=index >= first))
        for number, site in enumerate(self.sites):
            reducer = site.reducer(stage=number, predictor_eps=self.predictor_eps)
            setattr(self, f"reducer_{number}", reducer)

    def __call__(self, x: Array, context: Context) -> tuple[Array, tuple[Reduction, ...], dict[str, Any]]:
        """Runs the stage on `x [B, N, C]`.

        Returns:
          The cells after it, one `Reduction` per site, and the records "blocks"
          (cells after each block; a pair (slow, fast) where training carries
          both) and "stages" (cells that a site scored, twice: all of them stay).
        """
        numbers = {site.at: number for number, site in enumerate(self.sites)}
        reductions: list[Reduction] = []
        blocks, stages, route = [], [], None
        for index in range(len(self.blocks)):
            if index in numbers:
                cells = x.mixed(route.mask) if isinstance(x, Streams) else x
                route, reduction = self._decide(numbers[index], cells, context)
                x = Streams(cells, cells) if route.streams and not isinstance(x, Streams) else x
                reductions.append(reduction)
                stages.append((cells, cells))
            x = getattr(self, f"blocks_{index}")(x, context.dropout, route)
            blocks.append((x.slow, x.fast) if isinstance(x, Streams) else x)
        x = x.mixed(route.mask) if isinstance(x, Streams) else x
        return x, tuple(reductions), {"blocks": tuple(blocks), "stages": tuple(stages)}

    def _decide(self, number: int, cells: Array, context: Context) -> tuple[Route, Reduction]:
        reducer = getattr(self, f"reducer_{number}")
        tokens = Tokens.start(cells, prefix=0, grid=self.grid)
        _, reduction = reducer(tokens, None, context.train, **context.at_site(number))
        return Route.of(reduction, reducer.resolved(context.train), context.train), reduction


class DualPathStages(Backbone):
    """A stem, then stages, each on a grid half as fine as the one before.

    Sites are blocks of the third stage, `at` counts from its first block. All cells
    stay on their grid: those that a site does not keep take a cheaper path, and
    every site chooses among all cells anew. Blocks from the first site on have
    parameters for that path, so another first site needs other weights.

    The final tokens are one row that the classifier reads, the pooled one, then
    the cells of the last grid, each normalised.

    A subclass has `widths` (channels per stage) and gives
    `site_step` (blocks from one default site to the next),
    `embed(images, context)` (images to the cells `[B, N, C]` that enter block 0),
    `downsample(stage, x)` (cells of the stage before to those that enter `stage`,
    `[B, N / 4, C']`), `final_norm(x)` (cells of the last block `[B, N, C]` to the
    final rows `[B, 1 + N, C]`) and `block(stage, index)`, the recipe of a block;
    `layer`, `width`, `grid`, `drop_path`, `norm_eps` and `dtype` are added.

    Attributes (besides those of `Backbone`):
      patch_size: pixels, `n` or `(height, width)`.
      depths: blocks per stage.
      drop_path: stochastic depth of the last block, growing linearly from 0.
    """

    patch_size: Size = 4
    depths: tuple[Count, ...] = (2, 2, 6, 2)

    required = ("widths", "site_step", "embed", "downsample", "final_norm", "block")
    nested = False
    tap_noun = "stage"
    prefix = 1  # row of the final tokens that is no cell: the pooled one
    predictor_eps = 1e-5

    @property
    def total_stride(self) -> int:
        """What the sides of the first grid must divide by."""
        return 2 ** (len(self.depths) - 1)

    def check(self) -> None:
        super().check()
        if not self.depths:
            raise ValueError("depths is empty: it names the blocks of each stage")
        patch = pair(self.patch_size)
        units = (patch[0] * self.total_stride, patch[1] * self.total_stride)
        needs = f"patch_size {patch} and {len(self.depths)} stages"
        check_multiple(self.img_size, units, f"does not fit {needs}: it must be a multiple of {units}")

    def grid_of(self, stage: int) -> tuple[int, int]:
        """(rows, columns) of a stage."""
        size, patch = pair(self.img_size), pair(self.patch_size)
        return size[0] // patch[0] // 2**stage, size[1] // patch[1] // 2**stage

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the last stage."""
        return self.grid_of(len(self.depths) - 1)

    @property
    def taps(self) -> int:
        """Number of stages."""
        return len(self.depths)

    @property
    def depth(self) -> int:
        """Blocks of the stage that sites lie in."""
        return self.depths[SPARSE_STAGE] if len(self.depths) > SPARSE_STAGE else 0

    @property
    def default_sites(self) -> tuple[int, ...]:
        """Three sites from an early block of the third stage on, as the official models have them."""
        step = self.site_step
        return tuple(step * number for number in (1, 2, 3) if step * number < self.depth) or (0,)

    def site_grid(self, at: int) -> tuple[int, int]:
        """(rows, columns) of the third stage."""
        return self.grid_of(SPARSE_STAGE)

    def site_prefix(self, at: int) -> int:
        """None: the pooled row comes after the stages."""
        return 0

    def shows(self, at: int) -> frozenset[str]:
        """Nothing: the sites lie before the blocks."""
        return frozenset()

    def site_rates(self, rate: float, sites: int) -> tuple[float, ...]:
        """r, r - 0.2, r - 0.4, each of all cells.

        Raises:
          ValueError: a rate that leaves nothing to a later site.
        """
        rates = tuple(rate - 0.2 * number for number in range(sites))
        if rates[-1] <= 0:
            raise ValueError(
                f"keep={rate} falls by 0.2 from site to site, to {rates[-1]:.2g} at site {sites - 1}: give "
                f"more than {0.2 * (sites - 1):.2g}, or one rate per site"
            )
        return rates

    def refuse(self, reducer: Any, at: tuple[int, ...]) -> str | None:
        """Only methods that drop work: cells that are not kept take the fast path."""
        if len(self.depths) <= SPARSE_STAGE:
            return f"sites lie in the third stage, and it has {len(self.depths)}"
        reason = super().refuse(reducer, at)
        if reason is None and reducer.where == "inside":
            return "its sites lie inside a block, and there they lie before one"
        if reason is None and (reducer.adds_row or reducer.merges):
            return (
                "all cells stay on the grid, those that are not kept on a cheaper path, so there is "
                "nothing to fuse or merge"
            )
        return reason

    def make_stages(self) -> list[DualPathStage]:
        """The stages; called in `setup`."""
        return [
            DualPathStage(
                tuple(self._block(stage, index) for index in range(depth)),
                self.grid_of(stage),
                self.sites if stage == SPARSE_STAGE else (),
                self.predictor_eps,
                self.remat,
                name=f"stage_{stage}",
            )
            for stage, depth in enumerate(self.depths)
        ]

    def _block(self, stage: int, index: int) -> Spec:
        layer = sum(self.depths[:stage]) + index
        return self.block(stage, index).with_(
            layer=layer,
            width=self.widths[stage],
            grid=self.grid_of(stage),
            drop_path=self.drop_path * layer / max(1, sum(self.depths) - 1),
            norm_eps=self.norm_eps,
            dtype=self.dtype,
        )

    def __call__(
        self, images: Array, context: Context
    ) -> tuple[Tokens, tuple[Reduction, ...], dict[str, Any]]:
        """Runs stem, stages and final norm; returns tokens, one `Reduction` per site, records by name."""
        check_images(images, self.img_size, self.in_chans)
        x = self.embed(images.astype(self.dtype), context)
        records: dict[str, Any] = {"embed": x, "blocks": (), "stages": ()}
        reductions: tuple[Reduction, ...] = ()
        taps: dict[int, Tokens] = {}
        for number, stage in enumerate(self.stages):
            x = self.downsample(number, x) if number else x
            x, of_stage, more = stage(x, context)
            reductions += of_stage
            records |= {what: records[what] + rows for what, rows in more.items()}
            if number in context.taps:
                taps[number] = Tokens.start(x, prefix=0, grid=self.grid_of(number))
        tokens = Tokens.start(self.final_norm(x), prefix=1, grid=self.grid)
        if self.sites:  # written down, since the last decision is about cells too
            tokens = tokens.replace(alive=jnp.ones(tokens.place.shape, jnp.float32))
        records = {what: v for what, v in records.items() if what in context.record}
        return tokens, reductions, {**records, **({"taps": taps} if taps else {})}
