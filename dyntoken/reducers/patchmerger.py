"""PatchMerger: learnt queries attend to the rows."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.ops import select
from dyntoken.reducers.cluster import Mixing


class PatchMerger(Mixing):
    """`softmax(queries @ norm(x)^T) @ norm(x)`, one learnt query per new row.

    Renggli et al. 2022, Learning to merge tokens in vision transformers, section
    2.1; JoakimHaurum/TokenReduction, `models/patchmerger.py`. The softmax is over
    the rows, without a scale, and the values are the normalised rows.
    """

    @nn.compact
    def shares(self, tokens):
        x = tokens.patches.astype(jnp.float32)
        x = layers.LayerNorm(epsilon=self.predictor_eps, name="norm")(x)
        queries = self.param("queries", nn.initializers.normal(1.0), (self.keep, x.shape[-1]))
        logits = jnp.einsum("kc,bnc->bkn", queries, x, precision=select.HIGHEST)
        return jax.nn.softmax(logits, axis=-1), x
