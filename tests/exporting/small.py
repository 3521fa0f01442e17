"""Small models to export, and variables that spread their scores."""

import jax
import jax.numpy as jnp
import numpy as np

import dyntoken
from tests.backbones import small

VIT = {"width": 16, "heads": 2, "depth": 2, "img_size": 16, "patch_size": 4, "num_classes": 5}
EXITS = {"width": 16, "heads": 2, "depth": 1, "img_size": 48, "num_classes": 5}
MODELS = {
    "deit_tiny_patch16_224": VIT,
    "dtps_deit_tiny_patch16_224": {**VIT, "at": (1,)},
    "etps_deit_tiny_patch16_224": {**VIT, "at": (0,)},
    "evit_deit_tiny_patch16_224": {**VIT, "at": (0,)},
    "dvt_dtps_deit_small": {**EXITS, "exits": (2, 3), "at": (0,)},
    "multiexit_deit_tiny_patch16_224": {**VIT, "exits": (0, 1)},
}


def model_of(name):
    """A small model of that name; one of a backbone with stages as `tests.backbones.small` makes it."""
    if name in MODELS:
        return dyntoken.create_model(name, **MODELS[name])
    return dyntoken.create_model(name, num_classes=5, **small.options(dyntoken.models.split_name(name)[1]))


def variables_of(model, seed=0):
    """Values of the model's shapes, larger than freshly initialised ones."""
    images = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    rng = np.random.default_rng(seed)

    def fill(leaf):
        spread = 0.1 if len(leaf.shape) == 1 else 0.3
        return jnp.asarray(rng.standard_normal(leaf.shape) * spread + float(len(leaf.shape) == 1), leaf.dtype)

    return jax.tree.map(fill, shapes)


def noise(model, batch, seed=0):
    """Images `[batch, H, W, C]`."""
    return np.random.default_rng((seed, batch)).standard_normal((batch, *model.input_shape), np.float32)
