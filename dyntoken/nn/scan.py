"""A run of alike blocks as one loop: `lax.scan` over stacked parameters.

A program holds such a run once, however long it is, which is what its
compilation time goes with. Parameters stay in their tree, one `blocks_{i}` per
block; they are stacked inside the call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.nn.block import LayerArgs
from dyntoken.nn.spec import Spec
from dyntoken.ops import sample
from dyntoken.ops.rope import Rotation
from dyntoken.types import Tokens

Array = jax.Array
Tree = Any
VARYING = ("layer", "drop_path")  # what blocks of one run may differ in


class Records(NamedTuple):
    """Whether to return the rows after each block, and its attention logits."""

    blocks: bool
    relations: bool


def runs(recipes: Sequence[Spec], cuts: Sequence[int], numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """Splits block numbers into runs of alike blocks with nothing between them.

    Args:
      recipes: of all blocks (`Spec`).
      cuts: numbers of blocks that do not continue the run of the block before.
      numbers: the blocks to run, increasing.
    """
    shared = [recipe.with_(**dict.fromkeys(VARYING)) for recipe in recipes]
    grouped: list[list[int]] = []
    for index in numbers:
        if grouped and index not in cuts and shared[grouped[-1][-1]] == shared[index]:
            grouped[-1].append(index)
        else:
            grouped.append([index])
    return [tuple(run) for run in grouped]


def run_blocks(
    make: Callable[..., Any],
    recipes: Sequence[Spec],
    params: Sequence[Tree],
    tokens: Tokens,
    *,
    draws: sample.Draws | None,
    train: bool,
    bias: Sequence[Callable[[], Array] | None],
    rotation: Rotation | None,
    extra: Sequence[Array | None],
    records: Records,
) -> tuple[Tokens, tuple[Array, ...], tuple[Array | None, ...]]:
    """Runs alike blocks one after the other.

    Args:
      make: the class of the blocks.
      recipes: of each block, alike but for `VARYING`.
      params: parameters of each block.
      tokens: of which the blocks change `x` alone.
      bias: per block, see `Block.attend`; pytrees of one structure, or all None.
      rotation: of the rows in all of them.
      extra: per block, see `Block.feed_forward`; all alike, or all None.

    Returns:
      The tokens, per block the rows after it (without records only those of the
      last), and per block its attention logits or None.
    """
    highest = max(recipe["drop_path"] for recipe in recipes)
    block = dataclasses.replace(recipes[0], make=make)(drop_path=highest, parent=None)
    layers = LayerArgs(
        np.asarray([recipe["layer"] for recipe in recipes], np.int32),
        # 1 - (1 - rate) in these types is what a block on its own computes from its Python float.
        1 - np.asarray([1 - recipe["drop_path"] for recipe in recipes], np.float32),
    )

    def body(x: Array, step: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
        own, layer, bias, extra = step
        args = (tokens.replace(x=x), draws, train, False, records.relations, bias, rotation, layer)
        after, seen = block.apply({"params": own}, *args, method="attend")
        after = block.apply({"params": own}, after, draws, extra, layer, method="feed_forward")
        return after.x, (after.x if records.blocks else None, seen.logits if records.relations else None)

    steps = (_stack(params), layers, _stack(bias), _stack(extra))
    x, (outs, logits) = jax.lax.scan(body, tokens.x, steps)
    count = len(recipes)
    # The last row from the carry: where no other is read, the loop need not keep them.
    outs = (*(outs[i] for i in range(count - 1)), x) if records.blocks else (x,)
    logits = tuple(logits[i] for i in range(count)) if records.relations else (None,) * count
    return tokens.replace(x=x), outs, logits


def _stack(trees: Sequence[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
