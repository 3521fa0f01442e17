"""Sinkhorn: a transport plan between rows and learnt centres."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.ops import select
from dyntoken.reducers.cluster import Mixing
from dyntoken.schema import Natural, Positive

Array = jax.Array
EPS = 1e-12  # torch.nn.functional.normalize


class Sinkhorn(Mixing):
    """Rows and centres, both of length 1, are matched by entropy-regularised optimal transport.

    Every new row is the sum of the L2-normalised rows by the plan's weights: the
    weights need not sum to 1, and the rows' norms are lost. Haurum et al. 2022,
    Multi-scale hybrid vision transformer and Sinkhorn tokenizer;
    JoakimHaurum/TokenReduction, `models/sinkhorn.py`. That code overwrites the
    centres by their normalised values in every forward pass; here the parameter
    stays, and its gradient is, as there, that in the normalised centres.

    Attributes:
      iterations: of the Sinkhorn updates.
      epsilon: entropic regularisation, divides the similarity.
    """

    iterations: Natural = 3
    epsilon: Positive = 1.0

    @nn.compact
    def shares(self, tokens):
        x = unit(tokens.patches.astype(jnp.float32))
        v = self.param("v", nn.initializers.normal(1.0), (self.keep, x.shape[-1]))
        centres = v + jax.lax.stop_gradient(unit(v) - v)
        logits = jnp.einsum("kc,bnc->bkn", centres, x, precision=select.HIGHEST) / self.epsilon
        return transport(logits, self.iterations), x


def unit(x: Array) -> Array:
    """Rows of length 1; a row of zeros stays."""
    square = (x * x).sum(axis=-1, keepdims=True)
    return x / jnp.maximum(jnp.sqrt(jnp.maximum(square, EPS**2)), EPS)


def transport(logits: Array, iterations: int) -> Array:
    """Sinkhorn's plan of `logits [B, m, n]`, times (m + n); each margin is uniform, 1 / (m + n) per entry.

    The two totals differ unless m = n: after the last update the columns hold theirs.
    """
    margin = -jnp.log(float(sum(logits.shape[1:])))
    rows = jnp.zeros((*logits.shape[:2], 1))
    columns = jnp.zeros((logits.shape[0], 1, logits.shape[2]))
    for _ in range(iterations):
        rows = margin - jax.nn.logsumexp(logits + columns, axis=2, keepdims=True)
        columns = margin - jax.nn.logsumexp(logits + rows, axis=1, keepdims=True)
    return jnp.exp(logits + rows + columns - margin)
