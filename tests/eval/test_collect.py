"""Logits of every exit: every image once, whatever the padding and the number of devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken import data
from dyntoken.eval import logits as split_logits
from dyntoken.train import sharding as meshes
from dyntoken.types import Output

SOURCE = {"image_size": 16, "train": 8, "test": 37, "num_classes": 7}


class Pixels:
    """A 'model' of two exits that reads logits off the pixels."""

    exits = (1, 2)

    def apply(self, variables, images, *, train):
        assert not train
        first = images[:, 0, :3, 0]
        return Output(logits=jnp.stack([first, variables["scale"] * first]).astype(jnp.bfloat16))


def as_float(images):
    return images.astype(jnp.float32)


def run(batches, devices, model=None, scale=2.0):
    mesh = meshes.data_mesh(jax.devices()[:devices])
    step = split_logits.make_logits_step(model or Pixels(), mesh, prepare=as_float)
    placed = (meshes.place(batch, mesh) for batch in batches)
    return split_logits.collect(step, {"scale": jnp.float32(scale)}, placed)


@pytest.mark.parametrize(("devices", "batch"), [(1, 8), (4, 8), (4, 40)])
def test_every_image_once_and_in_order(devices, batch):
    whole = next(iter(data.eval_batches("fake", batch=37, shards=1, **SOURCE)))
    logits, labels = run(data.eval_batches("fake", batch=batch, **SOURCE), devices)
    assert logits.shape == (2, 37, 3) and logits.dtype == np.float32
    np.testing.assert_array_equal(labels, whole["label"])
    first = whole["image"][:, 0, :3, 0].astype(np.float32)
    np.testing.assert_array_equal(logits, [first, 2 * first])  # 8 bits are exact in bfloat16


def test_padding_may_lie_anywhere_and_be_anything():
    batch = {
        "image": np.arange(4 * 1 * 3, dtype=np.uint8).reshape(4, 1, 3, 1),
        "label": np.array([3, 9, 1, 9], np.int32),
        "mask": np.array([1, 0, 1, 0], np.float32),
    }
    logits, labels = run([batch, batch], 2)
    np.testing.assert_array_equal(labels, [3, 1, 3, 1])
    np.testing.assert_array_equal(logits[0], [[0, 1, 2], [6, 7, 8]] * 2)


def test_one_clear_error_each():
    class Plain:
        arch = "deit_tiny"

    with pytest.raises(ValueError, match=r"deit_tiny has no exits: thresholds need .* dvt_deit_small"):
        split_logits.make_logits_step(Plain(), meshes.data_mesh(jax.devices()[:1]), prepare=as_float)
    with pytest.raises(ValueError, match="the split is empty"):
        run([], 1)
    batch = {
        "image": np.ones((2, 1, 3, 1), np.uint8),
        "label": np.zeros(2, np.int32),
        "mask": np.ones(2, np.float32),
    }
    with pytest.raises(ValueError, match=r"not finite .first at exit 1, image 0"):
        run([batch], 1, scale=np.nan)
