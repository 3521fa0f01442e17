"""SiT: a small network weighs the rows for each new one."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.reducers.cluster import Mixing


class SelfSlimming(Mixing):
    """`softmax(gain * MLP(norm(x)))` over the rows, times the rows as they are.

    Self-slimmed vision transformer (SiT), ECCV 2022, section 3.2, the token
    slimming module without the paper's reverse reconstruction and distillation;
    JoakimHaurum/TokenReduction, `models/sit.py`. The hidden layer has half of the
    channels, and `gain` is a learnt scalar that starts at 1.
    """

    @nn.compact
    def shares(self, tokens):
        x = tokens.patches.astype(jnp.float32)
        hidden = layers.LayerNorm(epsilon=self.predictor_eps, name="weight_0")(x)
        hidden = layers.gelu(layers.dense(x.shape[-1] // 2, name="weight_1")(hidden))
        logits = layers.dense(self.keep, name="weight_3")(hidden)  # [B, n, keep]
        gain = self.param("gain", nn.initializers.ones, (1, 1, 1))
        return jnp.swapaxes(jax.nn.softmax(gain * logits, axis=1), 1, 2), x
