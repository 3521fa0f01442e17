"""Made outputs of models, for the tests of the losses."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from dyntoken import losses
from dyntoken.types import Reduction, Tokens

LN3 = float(np.log(3.0))
NAN = float("nan")


def site(decision, ratio=0.5, **fields):
    decision = jnp.asarray(decision, jnp.float32)
    index = jnp.zeros(decision.shape, jnp.int32)
    return Reduction(
        scores=decision, decision=decision, place=index, host=index, remap=index, ratio=ratio, **fields
    )


def rows(x, place=None, alive=None):
    """Tokens of patches `x [B, N, C]` behind one class token."""
    x = jnp.asarray(x, jnp.float32)
    tokens = Tokens.start(jnp.concatenate([jnp.full_like(x[:, :1], 9.0), x], axis=1))
    if place is not None:
        tokens = tokens.replace(place=jnp.asarray(place, jnp.int32))
    return tokens if alive is None else tokens.replace(alive=jnp.asarray(alive, jnp.float32))


def one(name, output, batch, **options):
    total, count = losses.Objective([(name, options)]).evaluate(output, batch)[name]
    assert total.dtype == count.dtype == jnp.float32 and total.shape == count.shape == ()
    return float(total), float(count)
