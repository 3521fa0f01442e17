"""A module's random streams as per-example draws."""

from __future__ import annotations

import flax.linen as nn
import jax

from dyntoken.nn.spec import Spec
from dyntoken.ops.sample import Draws

Array = jax.Array
# Fields of a backbone that draw in training where they are not 0.
RATES = ("dropout", "attn_dropout", "pos_dropout", "patch_drop", "drop_path", "mix_token")


def of_stream(module: nn.Module, stream: str, ids: Array) -> Draws | None:
    """Draws of one stream of `module`, None if `apply` got no key for it."""
    if module.has_rng(stream):
        return Draws(module.make_rng(stream), ids)
    return Draws(jax.random.key(0), ids) if module.is_initializing() else None


def of_dropout(module: nn.Module, backbone: Spec, ids: Array) -> Draws | None:
    """Draws for a backbone's dropout, stochastic depth and MixToken, None if it has none of them.

    Args:
      backbone: its recipe.
      ids: `[B]` global example indices.

    Raises:
      ValueError: the model draws and `apply` got no key.
    """
    rates = (getattr(module, "head_dropout", 0.0), *(backbone.get(rate, 0.0) for rate in RATES))
    if not any(map(_positive, rates)):
        return None
    draws = of_stream(module, "dropout", ids)
    if draws is None:
        raise ValueError("this model drops out or mixes tokens in training: pass rngs={'dropout': key}")
    return draws


def _positive(rate: float | tuple[float, ...]) -> bool:
    """Whether a rate, or one of the rates per stage, is not 0."""
    return any(rate) if isinstance(rate, tuple) else bool(rate)
