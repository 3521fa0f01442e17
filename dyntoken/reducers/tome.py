"""ToMe: the most similar patches become one, block after block."""

from __future__ import annotations

from dyntoken.ops import merge
from dyntoken.reducers.merging import Merged, Merging, unchanged
from dyntoken.schema import Keep
from dyntoken.types import Tokens


class ToMe(Merging):
    """Token merging (Bolya et al., "Token Merging: Your ViT but Faster", ICLR 2023; facebookresearch/ToMe).

    Section 3: at every block, between attention and MLP, the rows are split into
    those at even and at odd places. Each even row names its most similar odd
    one (cosine of the keys, averaged over heads); the r best pairs become their
    mean, weighted by `Tokens.size`. Attention counts a row as often as the
    patches it stands for ("proportional attention"). The rows of the prefix
    (class, distillation) take no part. It has no parameters, so it works on
    trained weights as they are, and trains in the gather form.

    Attributes (besides those of `Reducer`):
      r: pairs to merge per site: one number; `(r, inflect)` with a float, from
        `r * (1 - inflect)` at the first site linearly to `r * (1 + inflect)` at the
        last one (-1.0 falls to 0, Appendix C); or one number per site, zeros
        after the last one given. At most half of the patches merge. None: `keep`
        decides.
      proportional: add log(size) to the attention logits of the keys.
    """

    r: int | tuple[int | float, ...] | None = None
    proportional: bool = True

    needs = ("keys",)

    def site_keep(self, keep: Keep, sites: int, patches: int, prefix: int) -> Keep:
        """With `r`, counts per site; it overrules `keep`."""
        if self.r is None:
            return super().site_keep(keep, sites, patches, prefix)
        counts = []
        for r in pairs_per_site(self.r, sites):
            patches -= min(r, patches // 2)
            counts.append(patches)
        return tuple(counts)

    def merge(self, tokens: Tokens, seen, train: bool) -> Merged:
        if tokens.count == self.keep:
            return unchanged(tokens)
        # Without a class token the official code does not sort the sources that stay.
        matching = self.by_keys(tokens, seen, ascending=tokens.prefix > 0)
        x = merge.mean(tokens.patches, matching, tokens.size)
        return Merged(x, matching.keep, matching.remap, -matching.similarity)


def pairs_per_site(r: int | tuple[int | float, ...], sites: int) -> tuple[int, ...]:
    """`ToMe.r` as one number per site.

    Raises:
      ValueError: negative numbers, or more of them than sites.
    """
    if isinstance(r, int):
        found = (r,) * sites
    elif len(r) == 2 and isinstance(r[1], float):
        low = int(r[0] * (1 - r[1]))
        step = (2 * r[0] - 2 * low) / max(1, sites - 1)
        found = tuple(int(low + step * site) for site in range(sites))
    elif len(r) <= sites:
        found = (*map(int, r), *((0,) * (sites - len(r))))
    else:
        raise ValueError(f"r={r} has {len(r)} entries for {sites} sites (at=...)")
    if min(found) < 0:
        raise ValueError(f"r={r} merges {found} pairs: give r >= 0, and an inflection between -1.0 and 1.0")
    return found
