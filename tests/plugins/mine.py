"""What a user's own module adds to dyntoken: nothing here is part of the package."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import dyntoken
from dyntoken.backbones.isotropic import Isotropic
from dyntoken.backbones.sizes import pair
from dyntoken.backbones.vit import ViT
from dyntoken.data import ArrayRows, ArraySource
from dyntoken.nn import layers
from dyntoken.ops import select
from dyntoken.types import Reduction


def linear(tokens, seen, draws, stage, *, eps, **_):
    """A learnt scorer with parameters of its own."""
    x = nn.LayerNorm(epsilon=eps, name="scorer_norm")(tokens.patches.astype(jnp.float32))
    log_probs = nn.log_softmax(nn.Dense(2, name="scorer_keep")(x))
    return dyntoken.Scores(rank=log_probs[..., 0], log_probs=log_probs)


def attended(tokens, seen, draws, stage, **_):
    """EViT's scores under another name."""
    return dyntoken.Scores(rank=seen.cls, importance=seen.cls)


def key_norm(tokens, seen, draws, stage, **_):
    """Short keys first; rank alone, so that a fused row would be the plain mean."""
    keys = seen.keys[:, :, tokens.prefix :].astype(jnp.float32)
    return dyntoken.Scores(rank=-jnp.square(keys).sum(axis=-1).mean(axis=1))


def dice(tokens, seen, draws, stage, **_):
    """Chance, of which there is some in evaluation, too."""
    return dyntoken.Scores(rank=draws.uniform((tokens.count,), stage, 4))


def received(tokens, seen, draws, stage, **_):
    """The attention that a patch gets from all patches."""
    probs = seen.probs[:, :, tokens.prefix :, tokens.prefix :].mean(axis=1)  # [B, N, N]
    alive = jnp.ones(tokens.place.shape) if tokens.alive is None else tokens.alive
    return dyntoken.Scores(rank=(probs * alive[:, :, None]).sum(axis=1))


def pooled(targets, sources, *, importance, weight=None, **_):
    """EViT's arithmetic under another name."""
    share = importance if weight is None else importance * weight
    extra = (share[..., None] * sources.astype(jnp.float32)).sum(axis=1, keepdims=True)
    return dyntoken.Fused(targets, extra=extra.astype(targets.dtype))


class LongRows(dyntoken.Reducer):
    """A method that is no choice of rules: rows of large norm stay, the others are gone."""

    power: float = 2.0

    def reduce(self, tokens, seen, train, *, draws, noise, decision):
        n = tokens.count
        alive = jnp.ones(tokens.place.shape, jnp.float32) if tokens.alive is None else tokens.alive
        size = jnp.abs(tokens.patches.astype(jnp.float32)) ** self.power
        scores = jnp.where(alive > 0.5, size.sum(axis=-1), -jnp.inf)
        keep, _ = select.split(scores if decision is None else decision, self.keep)
        if self.resolved(train) == "gather":
            place, remap = select.lookup(tokens.place, keep), select.inverse(keep, n)
            x = jnp.concatenate([tokens.x[:, : tokens.prefix], select.take(tokens.patches, keep)], axis=1)
            tokens = tokens.replace(x=x, place=place)
            now = (remap >= 0).astype(jnp.float32)
        else:
            place, now = tokens.place, select.mask_of(keep, n) * alive
            remap = jnp.where(now > 0.5, jnp.arange(n, dtype=jnp.int32)[None], -1)
            tokens = tokens.replace(alive=now)
        host = select.lookup(place, remap)
        return tokens, Reduction(scores, now, place, host, remap, keep=keep)


class Tiled(Isotropic):
    """A backbone: square patches, each normalised, no class token."""

    patch_size: int = 4

    @property
    def prefix_rows(self):
        return {}

    @property
    def grid(self):
        return tuple(side // self.patch_size for side in pair(self.img_size))

    def setup_stem(self):
        self.patch_embed = layers.PatchEmbed((self.patch_size,) * 2, self.width, dtype=self.dtype)
        self.patch_norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)

    def stem_rows(self, images, context):
        x = self.patch_embed(images)
        return self.patch_norm(x.reshape(images.shape[0], -1, self.width))


class TallViT(ViT):
    """A ViT with other proportions: it has timm's keys."""


def sharpness(output, batch, *, power=1.0):
    """A loss: the entropy of the predictions."""
    log_p = jax.nn.log_softmax(output.logits)
    return -(jnp.exp(log_p) * log_p).sum() * power, jnp.float32(len(output.logits))


def open_stripes(name, data_dir, *, train=64, test=33):
    """A data set in memory: the brighter half names the class."""
    rows = {}
    for seed, (split, count) in enumerate({"train": train, "test": test}.items()):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, count).astype(np.int32)
        images = rng.integers(0, 99, (count, 16, 16, 3)).astype(np.uint8)
        for half in (0, 1):
            images[labels == half, :, 8 * half : 8 * half + 8] += 99
        rows[split] = ArrayRows(images, labels)
    counts = {split: len(found.labels) for split, found in rows.items()}
    info = dyntoken.data.DataInfo(name, 2, (16, 16, 3), counts, (0.5,) * 3, (0.25,) * 3)
    return ArraySource(info, rows)


dyntoken.register_scorer("linear", linear, learns=True)
dyntoken.register_scorer("attended", attended, needs="cls")
dyntoken.register_scorer("key_norm", key_norm, needs="keys")
dyntoken.register_scorer("received", received, needs="probs")
dyntoken.register_scorer("dice", dice)
dyntoken.register_scorer(
    "late", lambda tokens, seen, draws, stage, **_: dyntoken.Scores(tokens.size), where="inside"
)
dyntoken.register_fuser("pooled", pooled, adds_row=True)
dyntoken.register_method("learnt_linear", score="linear", fuse="squeeze")
dyntoken.register_method("attended", score="attended", fuse="pooled", source="EViT again")
dyntoken.register_method("keynorm", score="key_norm", fuse="mean")
dyntoken.register_method("longrows", LongRows)
TINY = {"width": 16, "depth": 3, "heads": 2, "img_size": 16, "patch_size": 4}
dyntoken.register_backbone("tiled", Tiled, {"tiled_tiny": TINY})
dyntoken.register_backbone("tall", TallViT, {"tall_tiny": TINY})
dyntoken.register_loss("sharpness", sharpness)
dyntoken.register_data("stripes", open_stripes)
