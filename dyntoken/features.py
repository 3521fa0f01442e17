"""What lies before the classifier: `Features`, and `unreduce`, which lays tokens out on their grid again."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import flax.struct
import jax

from dyntoken.ops import fill_grid, select
from dyntoken.types import Tokens

Array = jax.Array


@flax.struct.dataclass
class Features:
    """What `model.apply(variables, images, method="features")` returns; of a model with exits one per exit.

    Attributes:
      pooled: `[B, C]` float32, what the head classifies: pooled tokens, after its norm and
        representation layer (of a distilled model the mean of both tokens).
      tokens: the final, normalised `Tokens`: rows with their places and carriers.
      blocks: the `Tokens` after each block asked for, in the order asked.
      numbers: which blocks these are, from 0.
      count: how many the backbone has.
      logits: `[B, classes]` float32, where they were asked for.
    """

    pooled: Array
    tokens: Tokens
    blocks: tuple[Tokens, ...] = ()
    numbers: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    count: int = flax.struct.field(pytree_node=False, default=0)
    logits: Array | None = None

    def block(self, number: int) -> Tokens:
        """The tokens after a block, by its number (negative: from the end).

        Raises:
          ValueError: it was not asked for.
        """
        at = number + self.count if number < 0 else number
        if at not in self.numbers:
            raise ValueError(f"block {number} was not recorded: ask for it, as in blocks=({number},)")
        return self.blocks[self.numbers.index(at)]


def tap_numbers(blocks: Sequence[int], count: int, noun: str, owner: str) -> tuple[int, ...]:
    """Block numbers from 0, of some that may be negative.

    Args:
      count, noun: how many there are, and what they are.
      owner: whose, for the message.

    Raises:
      ValueError: another type, or a number that there is not.
    """
    try:
        numbers = [operator.index(number) for number in blocks]
    except TypeError:
        raise ValueError(f"blocks={blocks!r}: give the numbers of {noun}s as a tuple, as in (-1,)") from None
    for number in numbers:
        if not -count <= number < count:
            known = f"{noun}s 0 to {count - 1} (or {-count} to -1)" if count else f"no {noun}s to show"
            raise ValueError(f"blocks={tuple(numbers)}: {owner} has {known}, there is no {number}")
    return tuple(number % count for number in numbers)


def unreduce(features: Features | Tokens, fill: str = "host", block: int | None = None) -> Array:
    """Tokens on their full first grid, as a dense map; rows before the patches are left out.

    Args:
      features: of `method="features"`, or `Tokens` by themselves.
      fill: what a cell shows whose row is gone. "host": the row that carries it (that it was
        merged or squeezed into, EViT's fused one), zero if it was dropped. "zero": always zero.
        "bilinear": what lies between the cells that are left, see `ops.fill_grid.between`.
      block: number of a block of `features`; None takes the final tokens.

    Returns:
      `[B, H, W, C]`; without reduction the rows as they are. Gradients flow to the rows.

    Raises:
      ValueError: another `fill`, or a block that was not recorded.
    """
    if fill not in FILLS:
        raise ValueError(f"fill={fill!r}: give one of {', '.join(FILLS)}")
    if isinstance(features, tuple):
        raise ValueError("a model with exits has features for each of them: choose one, as in features[-1]")
    if isinstance(features, Features):
        tokens = features.tokens if block is None else features.block(block)
    elif block is None:
        tokens = features
    else:
        raise ValueError("block= chooses among the blocks of a model's features; these are tokens")
    cells = FILLS[fill](tokens)
    return cells.reshape(cells.shape[0], *tokens.grid, cells.shape[-1])


def _host(tokens: Tokens) -> Array:
    return select.gather_or_zero(tokens.patches, tokens.carrier)


def _zero(tokens: Tokens) -> Array:
    return select.gather_or_zero(tokens.patches, select.survivors(tokens.carrier, tokens.place))


def _bilinear(tokens: Tokens) -> Array:
    kept = select.survivors(tokens.carrier, tokens.place) >= 0
    return fill_grid.between(_zero(tokens), kept, tokens.grid)


# From tokens to their cells `[B, N0, C]`.
FILLS: dict[str, Callable[[Tokens], Array]] = {"host": _host, "zero": _zero, "bilinear": _bilinear}
