"""Where a backbone lets tokens be reduced, what reducers see there, and what they add to its parameters."""

from __future__ import annotations

import re
from typing import Any

# Fields of `Attended` that a reducer may need: what it ranks patches by; if there is none; if elsewhere.
NEEDS = {
    "cls": ("the class token", "there is none", "that joins at"),
    "keys": ("their attention keys", "no key there is that of one patch", "they have some only at"),
    "queries": ("their attention queries", "no query there is that of one patch", "they have some only at"),
    "values": ("their attention values", "no value there is that of one patch", "they have some only at"),
    "probs": ("the attention between them", "none is shown there", "it is shown only at"),
    "token": ("the class token", "there is none", "that joins at"),
    "normed": ("their block's norm", "none is shown there", "it is shown only at"),
}
REDUCER = re.compile(r"reducer_\d+")  # what trunks and stages call them
# What a method adds to a dense backbone: its reducers, and the fast paths beside the layers of blocks.
ADDED = rf"(^|/)({REDUCER.pattern}|fast_?(path|mlp)[^/]*)(/|$)"


def added(path: str) -> bool:
    """Whether a method adds the module or parameter of this path ("/" between names)."""
    return re.search(ADDED, path) is not None


class ReductionSites:
    """A backbone's side of reduction, as an isotropic one has it; stages override it.

    A backbone has `depth` positions for a site, numbered from 0, `grid` and
    `prefix` of its final tokens, and `default_sites`.

    Attributes:
      nested: a site sees what the one before it left. False: every site starts
        from a whole grid of its own.
      one_stack: its blocks are one trunk of `nn.block.Block`, which a method can
        follow and gate.
      site_noun: what the positions of sites count.
      resize: how the official code resizes position embeddings.
      naming: row of `weights.keys.RULES`, the key names of its public checkpoints; None: there are none.
    """

    nested = True
    one_stack = False
    site_noun = "block"
    resize = "bicubic"
    naming = None

    def sites_of(self, reducer: Any) -> tuple[int, ...]:
        """The default sites of a method: those that show what it needs."""
        usual = self.default_sites
        if reducer.pools:
            usual = (self.depth // 2,)
        if self.nested and reducer.from_block is not None:
            usual = tuple(range(min(reducer.from_block, self.depth - 1), self.depth))
        able = tuple(
            at
            for at in usual
            if self.shows(at).issuperset(reducer.needs) and self.shows_ahead(at).issuperset(reducer.recalls)
        )
        return able or usual

    def site_grid(self, at: int) -> tuple[int, int]:
        """(rows, columns) of the patches that the keep rate of a site refers to."""
        return self.grid

    def site_prefix(self, at: int) -> int:
        """Rows at a site that are no patches."""
        return self.prefix

    def site_rates(self, rate: float, sites: int) -> tuple[float, ...] | float:
        """One keep rate as one per site, or as it is: then the method's rule expands it."""
        return rate

    def shows(self, at: int) -> frozenset[str]:
        """Fields of `Attended` that a site inside a block sees."""
        shown = {"keys", "queries", "values", "probs", "normed"}
        return frozenset(shown | {"cls", "token"} if self.prefix else shown)

    def shows_ahead(self, at: int) -> frozenset[str]:
        """Fields of `Attended` of the block before that a site before a block sees."""
        return self.shows(at - 1) if self.nested and at else frozenset()

    def positions_of(self, path: str) -> tuple[int, tuple[int, int]]:
        """(prefix rows, grid) of a position embedding, by its path in the tree of variables."""
        return self.prefix, self.grid

    def refuse(self, reducer: Any, at: tuple[int, ...]) -> str | None:
        """Why a method cannot work here, as the end of a sentence; None if it can.

        Args:
          reducer: what it declares (`reducers.Reducer`): `needs`, `recalls`, `adds_row`, ...
          at: the sites.
        """
        if (reducer.follows or reducer.gates) and not self.one_stack:
            return "it takes part in every block, and there they are not one stack of plain ones"
        if min(at) < reducer.earliest:
            return f"it ranks patches by what the blocks before show, so sites begin at {reducer.earliest}"
        wanted = [(need, self.shows) for need in (*reducer.needs, *reducer.watches)]
        for need, shows in wanted + [(need, self.shows_ahead) for need in reducer.recalls]:
            what, absent, elsewhere = NEEDS[need]
            able = [site for site in range(self.depth) if need in shows(site)]
            if not able:
                return f"it ranks patches by {what}, and {absent}"
            if not set(at) <= set(able):
                return f"it ranks patches by {what}, and {elsewhere} {self.site_noun} {listed(able)}"
        return None


def listed(sites: list[int]) -> str:
    """`2 and 3 (at=(2, 3))`."""
    return f"{' and '.join(map(str, sites))} (at={tuple(sites)})"
