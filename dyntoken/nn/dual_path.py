"""Two paths through a block: DynamicViT where no cell may leave the grid.

Rao et al. 2022, "Dynamic Spatial Sparsification" (section 3.4; raoyongming/DynamicViT,
`dyswin.py` and `dyconvnext.py`): the cells a site keeps take the slow path of every
block, its MLP; the others a cheap one, the fast path. Every site chooses anew among
all cells.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from dyntoken.ops import select
from dyntoken.types import Reduction

Array = jax.Array
Layers = Callable[[Array], Array]


@flax.struct.dataclass
class Streams:
    """Cells `[B, N, C]` as if all were on the slow path, and as if on the fast one (training in mask form)."""

    slow: Array
    fast: Array

    def mixed(self, mask: Array) -> Array:
        """`[B, N, C]`: each cell from the path that `mask [B, N]` says."""
        weight = mask.astype(self.slow.dtype)[..., None]
        return self.slow * weight + self.fast * (1 - weight)

    def renewed(self, x: Array, mask: Array) -> Streams:
        """Each cell of `x [B, N, C]` on its own path; the other path keeps what it had."""
        weight = mask.astype(x.dtype)[..., None]
        return Streams(x * weight + self.slow * (1 - weight), x * (1 - weight) + self.fast * weight)


@flax.struct.dataclass
class Route:
    """Which cells take the slow path.

    Attributes:
      mask: `[B, N]` 1.0 for those; in training with straight-through gradient.
      order, back: `[B, N]` cells, those of the slow path first, and where each cell
        is in that order; None in mask form.
      gates: `[B, N]` ones in that order, which carry the gradient of the decision, in training in
        gather form; else None.
      slow: static number of cells on the slow path (gather form).
      streams: both paths go on side by side (`Streams`), as the official training does.
    """

    mask: Array
    order: Array | None = None
    back: Array | None = None
    gates: Array | None = None
    slow: int = flax.struct.field(pytree_node=False, default=0)
    streams: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def of(cls, reduction: Reduction, form: str, train: bool) -> Route:
        """The route that a site decided on, in the form in force ("mask" or "gather")."""
        if form == "mask":
            return cls(reduction.decision, streams=train)
        order = jnp.concatenate(select.split(reduction.decision, reduction.count), axis=1)
        gates = None
        if train:
            mask = jnp.take_along_axis(reduction.decision, order, axis=1)
            gates = jnp.where(jnp.arange(mask.shape[1])[None] < reduction.count, mask, 1.0 - mask)
        return cls(reduction.decision, order, select.order(-order), gates, reduction.count)


def branch(route: Route, x: Array, slow: Layers, fast: Layers) -> Array:
    """`slow` on the cells of the slow path, `fast` on the others: `[B, N, C]` in and out.

    The gather form runs each on its own cells, the mask form both on all. In training the
    gather form's results are scaled by `Route.gates`, as a router scales its expert's
    (Fedus et al. 2022, "Switch Transformers", section 2.1): a decision learns from the path that ran.

    Args:
      slow, fast: `[B, n, C]` -> `[B, n, C]`, each cell by itself.
    """
    if route.order is None:
        return jnp.where(route.mask[..., None] > 0.5, slow(x), fast(x))
    moved = select.take(x, route.order)
    paths = [slow(moved[:, : route.slow]), fast(moved[:, route.slow :])]
    y = jnp.concatenate(paths, axis=1)
    y = y if route.gates is None else y * route.gates[..., None].astype(y.dtype)
    return select.take(y, route.back)
