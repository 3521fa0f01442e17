"""A run of alike blocks as one loop: `lax.scan` over stacked parameters.

A program holds such a run once, however long it is, which is what its
compilation time goes with. Parameters stay in their tree, one `blocks_{i}` per
block; they are stacked inside the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.nn.block import LayerArgs
from dyntoken.ops import sample
from dyntoken.types import Tokens

Array = jax.Array
Tree = Any
VARYING = ("layer", "drop_path")  # what blocks of one run may differ in


class Records(NamedTuple):
    """Whether the rows after each block, and its attention logits, are asked for."""

    blocks: bool
    relations: bool


def runs(recipes: Sequence[Any], cuts: Sequence[int], numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """Splits block numbers into runs of alike blocks with nothing between them.

    Args:
      recipes: of all blocks (`trunk.Spec`).
      cuts: numbers of blocks that do not continue the run of the block before.
      numbers: the blocks to run, increasing.
    """
    found: list[list[int]] = []
    for index in numbers:
        alike = found and _shared(recipes[found[-1][-1]]) == _shared(recipes[index])
        if alike and index not in cuts:
            found[-1].append(index)
        else:
            found.append([index])
    return [tuple(run) for run in found]


def _shared(recipe: Any) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    return recipe.make, tuple((key, value) for key, value in recipe.options if key not in VARYING)


def run_blocks(
    make: Callable[..., Any],
    options: Sequence[dict[str, Any]],
    params: Sequence[Tree],
    tokens: Tokens,
    *,
    draws: sample.Draws | None,
    train: bool,
    bias: Sequence[Callable[[], Array] | None],
    extra: Sequence[Array | None],
    wanted: Records,
) -> tuple[Tokens, tuple[Array, ...], tuple[Array | None, ...]]:
    """Runs alike blocks one after the other.

    Args:
      make: the class of the blocks.
      options: fields of each block, equal but for `VARYING`.
      params: parameters of each block.
      tokens: of which the blocks change `x` alone.
      bias: per block, see `Block.attend`; pytrees of one structure, or all None.
      extra: per block, see `Block.feed_forward`; all alike, or all None.

    Returns:
      The tokens, per block the rows after it (only those of the last unless
      wanted), and per block its attention logits or None.
    """
    highest = max(o["drop_path"] for o in options)
    block = make(**{**options[0], "drop_path": highest}, parent=None)
    layers = LayerArgs(
        np.asarray([o["layer"] for o in options], np.int32),
        # 1 - (1 - rate) in these types is what a block on its own computes from its Python float.
        1 - np.asarray([1 - o["drop_path"] for o in options], np.float32),
    )

    def one(x: Array, step: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
        held, layer, bias, extra = step
        given = (tokens.replace(x=x), draws, train, False, wanted.relations, bias, layer)
        after, seen = block.apply({"params": held}, *given, method="attend")
        after = block.apply({"params": held}, after, draws, extra, layer, method="feed_forward")
        return after.x, (after.x if wanted.blocks else None, seen.logits if wanted.relations else None)

    steps = (_stack(params), layers, _stack(bias), _stack(extra))
    x, (outs, logits) = jax.lax.scan(one, tokens.x, steps)
    count = len(options)
    # The last row from the carry: where no other is read, the loop need not keep them.
    outs = (*(outs[i] for i in range(count - 1)), x) if wanted.blocks else (x,)
    logits = tuple(logits[i] for i in range(count)) if wanted.relations else (None,) * count
    return tokens.replace(x=x), outs, logits


def _stack(trees: Sequence[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
