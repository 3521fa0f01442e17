"""PVT and CvT: tokens are reduced within a stage, and the next stage has its whole grid again."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

from dyntoken.backbones.base import Backbone
from dyntoken.backbones.sizes import check_heads, check_images, of_stage
from dyntoken.nn.reduction_sites import listed
from dyntoken.nn.spatial import RegrownStage
from dyntoken.nn.spec import Site, Spec
from dyntoken.nn.trunk import Context
from dyntoken.ops import sample
from dyntoken.schema import Count, Positive, Rate
from dyntoken.types import Reduction, Tokens

Array = jax.Array


class RegrownStages(Backbone):
    """Stages of falling resolution, each with blocks of its own width.

    `at` counts stages, from 0. A site lies in the first block of its stage:
    before it for learnt scores, between its attention and its MLP for class
    attention. The survivors run through the stage; before a convolution of a
    block, and before the next stage's embedding, they are laid out on the
    stage's grid, where dropped cells are zero or keep their last value
    (`dropped`). The next stage's grid is complete again, so that a keep rate
    refers to each stage's own number of patches.

    Class attention needs a class token, so it can rank patches only in the
    stage that has one, and EViT's fused token needs a stage without maps, as it
    has no cell.

    A subclass gives, per stage, the (rows, columns) of patches in `grids` and the
    number of class tokens in `prefixes`; it says in `convolves(stage)` whether its
    blocks take keys from a map; `embed(stage)` and `block(stage)` are the recipes
    of the embedding it starts with and of a block (fields that all kinds share
    are added).

    Attributes (besides those of `Backbone`):
      widths, depths, heads, mlp_ratios: one number per stage.
      qkv_bias, dropout, attn_dropout: one for all stages, or one per stage.
      drop_path: stochastic depth of the last block, or of the last one of each stage.
      dropped: what a map shows where a token was dropped: "zero" (as TPS
        describes it), or "last", its value when it was dropped.
    """

    widths: tuple[Count, ...] = (64, 128, 320, 512)
    depths: tuple[Count, ...] = (3, 4, 6, 3)
    heads: tuple[Count, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[Positive, ...] = (8.0, 8.0, 4.0, 4.0)
    qkv_bias: bool | tuple[bool, ...] = True
    dropout: Rate | tuple[Rate, ...] = 0.0
    attn_dropout: Rate | tuple[Rate, ...] = 0.0
    drop_path: Rate | tuple[Rate, ...] = 0.0
    drop_path_rule: Literal["linear", "constant"] = "linear"
    dropped: Literal["zero", "last"] = "zero"

    required = ("grids", "prefixes", "convolves", "embed", "block")
    nested = False
    site_noun = tap_noun = "stage"
    per_stage = ("depths", "heads", "mlp_ratios")
    positions = False

    @property
    def depth(self) -> int:
        """Number of stages."""
        return len(self.widths)

    @property
    def taps(self) -> int:
        """Number of stages."""
        return self.depth

    @property
    def default_sites(self) -> tuple[int, ...]:
        """Every stage."""
        return tuple(range(self.depth))

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the last stage."""
        return self.grids[-1]

    @property
    def prefix(self) -> int:
        """Class tokens of the last stage."""
        return self.prefixes[-1]

    def check(self) -> None:
        super().check()
        for name in (*self.per_stage, "qkv_bias", "dropout", "attn_dropout", "drop_path"):
            values = getattr(self, name)
            if (isinstance(values, tuple) or name in self.per_stage) and len(values) != self.depth:
                raise ValueError(
                    f"{name}={values} has {len(values)} entries for {self.depth} stages (widths={self.widths})"
                )
        check_heads(self.widths, self.heads)

    # Where sites may lie

    def site_grid(self, at: int) -> tuple[int, int]:
        """(rows, columns) of a stage."""
        return self.grids[at]

    def site_prefix(self, at: int) -> int:
        """Class tokens of a stage."""
        return self.prefixes[at]

    def shows(self, at: int) -> frozenset[str]:
        """Class attention where a stage has a class token; keys come from a map and are no tokens'."""
        return frozenset({"cls"} if self.prefixes[at] else ())

    def positions_of(self, path: str) -> tuple[int, tuple[int, int]]:
        """(prefix rows, grid) of the position embedding of the stage that a path names."""
        stage = int(path.rpartition("stage_")[2].partition("/")[0])
        return self.prefixes[stage], self.grids[stage]

    def refuse(self, reducer: Any, at: tuple[int, ...]) -> str | None:
        """Also refuses a fused token, or rows of mixtures, in a stage that needs a map, and what wants every block."""
        if reducer.from_block is not None:
            return "it takes a few tokens at every block, and only the first one of a stage has a site"
        if reducer.pools:
            return "it pools the grid, and every stage pools its own already"
        reason = super().refuse(reducer, at)
        if reason is None and (reducer.adds_row or reducer.mixes):
            free = [s for s in range(self.depth) if s == self.depth - 1 and not self.convolves(s)]
            if not set(at) <= set(free):
                where = f"only stage {listed(free)} needs none" if free else "every stage needs one"
                what = "fused token has" if reducer.adds_row else "mixtures of patches have"
                return f"its {what} no cell on a map, and {where}"
        return reason

    # Running

    def setup(self) -> None:
        at = {site.at: site for site in self.sites}
        for number in range(self.depth):
            setattr(self, f"stage_{number}", self._stage(number, at.get(number)))
        self.norm = self.make_norm()

    def _stage(self, number: int, site: Site | None) -> RegrownStage:
        return RegrownStage(
            embed=self.embed(number),
            blocks=tuple(self._block(number, index, site) for index in range(self.depths[number])),
            sites=() if site is None else (dataclasses.replace(site, at=0),),
            grid=self.grids[number],
            width=self.widths[number],
            prefix=self.prefixes[number],
            positions=self.positions,
            dropout=of_stage(self.dropout, number),
            layer=sum(self.depths) + number,
            dropped=self.dropped,
            remat=self.remat,
        )

    def _block(self, number: int, index: int, site: Site | None) -> Spec:
        return self.block(number).with_(
            layer=sum(self.depths[:number]) + index,
            width=self.widths[number],
            heads=self.heads[number],
            mlp_ratio=self.mlp_ratios[number],
            qkv_bias=of_stage(self.qkv_bias, number),
            dropout=of_stage(self.dropout, number),
            attn_dropout=of_stage(self.attn_dropout, number),
            drop_path=self.path_rate(number, index),
            norm_eps=self.norm_eps,
            reduced=site is not None and (index > 0 or not site.inside),
            dropped=self.dropped,
            dtype=self.dtype,
        )

    def path_rate(self, number: int, index: int) -> float:
        """Stochastic depth of a block of a stage.

        One rate grows over all blocks; with one per stage each grows over that stage's.
        """
        if isinstance(self.drop_path, tuple):
            return self._grown(self.drop_path[number], index, self.depths[number])
        return self._grown(self.drop_path, sum(self.depths[:number]) + index, sum(self.depths))

    def _grown(self, rate: float, index: int, blocks: int) -> float:
        return rate if self.drop_path_rule == "constant" else rate * index / max(1, blocks - 1)

    def __call__(
        self, images: Array, context: Context
    ) -> tuple[Tokens, tuple[Reduction, ...], dict[str, Any]]:
        """Runs the stages and the last norm.

        Returns:
          Tokens of the last stage, one `Reduction` per site, records by name (those
          of the trunk stage after stage, and "embed" of the first).
        """
        check_images(images, self.img_size, self.in_chans)
        x = images.astype(self.dtype)
        reductions: list[Reduction] = []
        records: list[dict[str, Any]] = []
        taps: dict[int, Tokens] = {}
        for number in range(self.depth):
            stage = getattr(self, f"stage_{number}")
            tokens, of_stage, more = stage(x, self._context(context, number))
            reductions.extend(of_stage)
            records.append(more)
            if number in context.taps:
                taps[number] = tokens.replace(last=None)
            if number < self.depth - 1:
                x = stage.to_next_stage(tokens)
        merged = {name: tuple(value for more in records for value in more[name]) for name in records[0]}
        if "embed" in merged:
            merged["embed"] = merged["embed"][0]
        merged |= {"taps": taps} if taps else {}
        return tokens.replace(x=self.norm(tokens.x), last=None), tuple(reductions), merged

    def _context(self, context: Context, number: int) -> Context:
        """The context of one stage: its own site's draws, noise and decisions."""
        context = dataclasses.replace(context, taps=())  # they count stages
        at = [site.at for site in self.sites]
        if number not in at:
            return dataclasses.replace(context, noise=None, decisions=None)
        index = at.index(number)
        policy = context.policy
        if policy is not None:
            policy = sample.Draws(jax.random.fold_in(policy.key, index), policy.ids)
        return dataclasses.replace(
            context,
            policy=policy,
            noise=None if context.noise is None else (context.noise[index],),
            decisions=None if context.decisions is None else (context.decisions[index],),
        )
