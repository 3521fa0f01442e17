"""The loss that holds learnt numbers of tokens to a number of multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dyntoken.losses.common import Pair, final_tokens, loss, row_mask
from dyntoken.schema import Positive
from dyntoken.types import Output


@loss("features", exits="none")
def multiply_adds(output: Output, batch: Mapping[str, Any], *, gmacs: Positive) -> Pair:
    """Squared distance of the blocks' multiply-adds, in units of 1e9, from a target.

    Chen et al., ICCV 2023, section 3.3 (OpenGVLab/DiffRate): per block
    `4 N C^2 + 2 N^2 C` of attention and `8 N C^2` of an MLP of ratio 4, with N rows
    before and after its site. As in its code the gradient of that minimum goes to
    both counts and not to earlier blocks.

    Args:
      output: of a model with a site of learnt counts (`Reduction.learnt`) at every
        block, recorded with `record=("features",)`.
      batch: `"mask"` `[B]`.
      gmacs: the target, of the blocks alone.

    Returns:
      (distance times number of rows, number of rows).

    Raises:
      ValueError: for a model without learnt counts, or with exits.
    """
    tokens = final_tokens(output, "student", "multiply_adds")
    total = blocks_multiply_adds(output, tokens.x.shape[-1], tokens.prefix)
    count = jnp.sum(row_mask(batch, output.logits.shape[0]))
    return count * jnp.square(total / 1e9 - gmacs), count


def blocks_multiply_adds(output: Output, width: int, prefix: int) -> jax.Array:
    """What `multiply_adds` counts: a scalar with the gradient of the learnt counts."""
    sites = output.reductions
    learnt = [site.learnt for site in sites if site.learnt is not None]
    if not sites or len(learnt) < len(sites):
        raise ValueError(
            "loss 'multiply_adds' needs learnt counts at every site: diffrate_... with learn=True"
        )
    total, rows = jnp.zeros((), jnp.float32), jnp.float32(sites[0].grid[0] * sites[0].grid[1] + prefix)
    for counts in learnt:
        total += 4 * rows * width**2 + 2 * rows**2 * width
        left = jnp.minimum(rows, counts.min() + prefix)
        both = (counts - jax.lax.stop_gradient(counts)).sum()
        rows = jax.lax.stop_gradient(left) + both
        total += 8 * rows * width**2
    return total
