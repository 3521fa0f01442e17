"""Rows that leave for a while: choosing them out of several arrays, and putting them back."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from dyntoken.ops import select
from dyntoken.types import Tokens

Array = jax.Array
Tree = TypeVar("Tree")


def taken(tree: Tree, rows: Array) -> Tree:
    """Each `[B, n, ...]` of a pytree at `rows [B, k]`: `[B, k, ...]`."""
    return jax.tree.map(lambda x: select.take(x, rows), tree)


def concatenated(first: Tree, second: Tree) -> Tree:
    """Two pytrees of `[B, n, ...]` and `[B, m, ...]`, row after row."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)


def placed(tokens: Tokens, x: Array, place: Array) -> Tokens:
    """`tokens` with the patch rows `x [B, n, C]` at the cells `place [B, n]`, each carrying its own."""
    carrier = select.inverse(place, tokens.initial)
    return tokens.replace(
        x=jnp.concatenate([tokens.x[:, : tokens.prefix], x], axis=1),
        place=place,
        carrier=carrier,
        size=select.sizes(carrier, x.shape[1]),
    )
