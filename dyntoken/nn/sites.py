"""What a backbone says about the sites where tokens can be reduced."""

from __future__ import annotations


class Sites:
    """The answers of an isotropic backbone; a hierarchical one overrides them.

    A backbone has `depth` positions for a site, numbered from 0, `grid` and
    `prefix` of its final tokens, and `default_sites`.

    Attributes:
      nested: a site sees what the one before it left. False: every site starts
        from a whole grid of its own.
      site_noun: what the positions of sites count.
      resize: how the official code resizes position embeddings.
    """

    nested = True
    site_noun = "block"
    resize = "bicubic"

    def sites_of(self, score: str) -> tuple[int, ...]:
        """Where a method with this scorer reduces unless told otherwise."""
        return self.default_sites

    def site_grid(self, at: int) -> tuple[int, int]:
        """(rows, columns) of the patches whose number the keep rate of a site refers to."""
        return self.grid

    def site_rates(self, rate: float, sites: int) -> tuple[float, ...] | float:
        """One keep rate as one per site; a number leaves that to the method's own rule."""
        return rate

    def shows(self, at: int) -> frozenset[str]:
        """Fields of `Attended` that a site inside a block sees."""
        return frozenset({"keys", "cls"} if self.prefix else {"keys"})

    def positions_of(self, path: str) -> tuple[int, tuple[int, int]]:
        """(prefix rows, grid) of a position embedding, by its path in the tree of variables."""
        return self.prefix, self.grid

    def refuse(self, *, score: str, fuse: str, at: tuple[int, ...]) -> str | None:
        """Why a method makes no sense here, as the end of a sentence; None if it does.

        Args:
          score, fuse: rows of `reducers.score.SCORERS` and `ops.fuse.FUSERS`.
          at: the sites.
        """
        if score == "class_attention" and not self.prefix:
            return "it ranks patches by the class token, and there is none"
        return None
