"""AdaViT: every block decides which patches, heads and sub-layers an image needs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dyntoken.nn import layers
from dyntoken.ops import attend, select
from dyntoken.reducers.base import Reducer
from dyntoken.reducers.placing import concatenated, placed, taken
from dyntoken.schema import Natural, Positive, Share
from dyntoken.types import Gate, Reduction, Tokens

Array = jax.Array
PARTS = ("tokens", "layers", "heads")  # numbers of their noise


@flax.struct.dataclass
class Choices:
    """What one block decided, each None where it does not choose.

    Attributes:
      tokens, heads, layers: `[B, prefix + n]`, `[B, H]`, `[B, 2]`, 1.0 for what is used,
        in training with straight-through gradient.
      token_logits, head_logits, layer_logits: what they were decided by, `[B, n]`, `[B, H]`, `[B, 2]`.
    """

    tokens: Array | None = None
    heads: Array | None = None
    layers: Array | None = None
    token_logits: Array | None = None
    head_logits: Array | None = None
    layer_logits: Array | None = None


@flax.struct.dataclass
class Usage:
    """What AdaViT carries through the blocks.

    Attributes:
      choices: those of each block so far, for the loss `usage`.
      waiting: (rows `[B, w, C]`, places) of those that leave out the present block; None for none.
    """

    choices: tuple[Choices, ...] = ()
    waiting: tuple[Array, Array] | None = None


class AdaViT(Reducer):
    """Linear policies switch patches, attention heads and sub-layers off, block by block and image by image.

    Meng et al., CVPR 2022, "AdaViT: Adaptive Vision Transformers for Efficient
    Image Recognition", section 3; MengLcool/AdaViT. The class row of a block's
    input decides about heads and sub-layers, the norm of each patch about the
    patch. A patch that is left out attends to itself alone and keeps its value; the
    next block decides anew. Evaluation takes what has a sigmoid above its
    threshold; training adds the difference of two Gumbel draws and divides by
    `tau` first, straight-through. The loss `usage` holds the shares to a target.

    In gather form `keep` bounds how many patches go through a block: the best
    ones do, those of them that are above the threshold count; the others wait
    for the next block. With `keep=1.0`, the default, nothing is saved: as in the
    official code, everything is computed and then masked. What heads
    and sub-layers would save differs from image to image, so that no fixed shape has it.

    A `noise` entry of this method is a dict: "tokens" `[B, n]`, "heads" `[B, H]`, "layers"
    `[B, 2]`, differences of two Gumbel draws.

    Attributes:
      heads: number of attention heads, the backbone's.
      choose_tokens, choose_heads, choose_layers: what is decided at all.
      keep_blocks: so many first sites use all heads and sub-layers.
      token_start: the first site that chooses patches.
      threshold: of heads and sub-layers.
      token_threshold: of patches.
      tau: temperature in training.
      token_mlp: a patch that is left out skips the MLP, too.
      reference: as the official code without `ada_head_v2`, a dropped head also
        hides its share of channels from the MLP.
    """

    heads: Natural = 0
    choose_tokens: bool = True
    choose_heads: bool = True
    choose_layers: bool = True
    keep_blocks: Natural = 1
    token_start: Natural = 0
    threshold: Share = 0.5
    token_threshold: Share = 0.6
    tau: Positive = 5.0
    token_mlp: bool = True
    reference: bool = False

    learns = True
    needs = ("normed", "token")
    follows = True
    gates = True
    returns = True
    from_block = 0
    default_keep = 1.0
    of_body = ("heads",)
    dialect = "adavit"

    @nn.compact
    def reduce(self, tokens, seen, train, *, draws, noise, decision) -> tuple[Tokens, Reduction]:
        noise = self._noise(tokens, draws, noise) if train else dict.fromkeys(PARTS)
        found: dict[str, Array | None] = {}
        for what, width, on in (("head", self.heads, self.choose_heads), ("layer", 2, self.choose_layers)):
            if on and self.stage >= self.keep_blocks:
                logits = layers.dense(width, name=f"{what}_select")(seen.token).astype(jnp.float32)
                found[f"{what}_logits"] = logits
                found[f"{what}s"] = self._chosen(logits, noise[f"{what}s"], self.threshold)
        n, rows = tokens.count, jnp.arange(tokens.count, dtype=jnp.int32)[None]
        logits, chosen = jnp.zeros(tokens.place.shape, jnp.float32), jnp.ones(tokens.place.shape, jnp.float32)
        if chooses := self.choose_tokens and self.stage >= self.token_start:
            normed = seen.normed[:, tokens.prefix :]
            logits = layers.dense(1, name="token_select")(normed)[..., 0].astype(jnp.float32)
            chosen = self._chosen(logits, noise["tokens"], self.token_threshold)
        keep = jnp.broadcast_to(rows, logits.shape)
        if decision is not None:
            chosen, chooses = decision.astype(jnp.float32), True
        if self.keep < n:
            keep, wait = select.split(logits if decision is None else decision, self.keep)
            chosen, chooses = chosen * select.mask_of(keep, n), True
        place, remap, waiting, now = tokens.place, jnp.broadcast_to(rows, logits.shape), None, chosen
        if self.resolved(train) == "gather" and self.keep < n:
            waiting = taken((tokens.patches, place), wait)
            x, place, chosen = taken((tokens.patches, place, chosen), keep)
            remap = select.inverse(keep, n)
            tokens = tokens.replace(x=jnp.concatenate([tokens.x[:, : tokens.prefix], x], axis=1), place=place)
        if chooses:
            found |= {"tokens": attend.with_prefix(chosen, tokens.prefix), "token_logits": logits}
        choices = Choices(**found)
        past = () if tokens.state is None else tokens.state.choices
        tokens = tokens.replace(gate=self._gate(choices, train), state=Usage((*past, choices), waiting))
        host = select.lookup(place, remap)
        return tokens, Reduction(logits, now, place, host, remap, keep=keep if self.keep < n else None)

    def _noise(self, tokens: Tokens, draws: Any, noise: Any) -> dict[str, Array]:
        if noise is not None:
            return {**dict.fromkeys(PARTS, 0.0), **noise}
        if draws is None:
            raise ValueError(
                "training with a learnt decision draws Gumbel noise: pass rngs={'policy': key} or noise=(...)"
            )
        counts = (tokens.count, 2, self.heads)
        pairs = (draws.gumbel((size, 2), self.stage, part) for part, size in enumerate(counts))
        return {part: pair[..., 0] - pair[..., 1] for part, pair in zip(PARTS, pairs, strict=True)}

    def _chosen(self, logits: Array, noise: Array | None, threshold: float) -> Array:
        """1.0 for what is used, in training (with noise) straight-through."""
        if noise is None:
            return (jax.nn.sigmoid(logits) > threshold).astype(jnp.float32)
        soft = jax.nn.sigmoid((logits + noise) / self.tau)
        return (soft > threshold).astype(jnp.float32) + (soft - jax.lax.stop_gradient(soft))

    def _gate(self, choices: Choices, train: bool) -> Gate:
        policy = None
        if choices.tokens is not None:
            policy = jax.lax.stop_gradient(choices.tokens)
            if train:  # what a row that is left out would read, itself, is what its decision learns from
                pairs = policy[:, :, None] * policy[:, None, :]
                policy = jnp.maximum(pairs, jnp.eye(policy.shape[1])[None])
        return Gate(
            policy=policy,
            outputs=choices.tokens,
            branches=choices.layers,
            heads=choices.heads,
            mlp_heads=self.reference,
            mlp_outputs=self.token_mlp,
        )

    def follow(self, tokens: Tokens, seen: Any, *, block: int, closes: bool, last: bool) -> Tokens:
        """Puts the rows back that left the block out."""
        if tokens.state is None:
            return tokens
        waiting, state = tokens.state.waiting, tokens.state.replace(waiting=None)
        if waiting is not None:
            tokens = placed(tokens, *concatenated((tokens.patches, tokens.place), waiting))
        return tokens.replace(gate=None, state=state)
