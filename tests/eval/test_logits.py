"""Evaluation: exact counts whatever the padding and the number of devices."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import config as recipes
from dyntoken import data, device_augment, train
from dyntoken.eval.logits import classify, make_eval_step
from dyntoken.train import sharding as meshes
from dyntoken.types import Output

MEAN, STD = (0.5,) * 3, (0.25,) * 3
SOURCE = {"image_size": 16, "train": 8, "test": 37, "num_classes": 7}
prepare = functools.partial(device_augment.normalize, mean=MEAN, std=STD)


class Fixed:
    """A 'model' that reads its logits off the first row of pixels."""

    def apply(self, variables, images, *, train):
        assert not train
        return Output(logits=images[:, 0, :, 0] * variables["scale"])


def evaluate(model, variables, batches, devices, normal=prepare):
    mesh = meshes.data_mesh(jax.devices()[:devices])
    step = meshes.data_parallel(make_eval_step(model, prepare=normal), mesh, replicated=1)
    return classify(step, variables, (meshes.place(batch, mesh) for batch in batches))


def test_by_hand():
    """Six classes, three rows and one of padding: ranks 1, 5 and 6."""
    logits = np.array([[9, 1, 1, 1, 1, 0], [5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 9]])
    batch = {
        "image": np.broadcast_to(logits[:, None, :, None], (4, 2, 6, 1)).astype(np.uint8),
        "label": np.array([0, 4, 5, 5], np.int32),
        "mask": np.array([1, 1, 1, 0], np.float32),
    }
    as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
    found = evaluate(Fixed(), {"scale": jnp.float32(1.0)}, [batch], 4, as_float)
    assert found["count"] == 3 and isinstance(found["count"], int)
    assert found["top1"] == pytest.approx(1 / 3) and found["top5"] == pytest.approx(2 / 3)
    losses = [
        np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, batch["label"], strict=True)
    ]
    assert found["loss"] == pytest.approx(np.mean(losses[:3]), rel=1e-6)


class Exits:
    """Two exits: the first reads row 0 of the pixels, the second row 1."""

    exits = (1, 2)

    def apply(self, variables, images, *, train):
        return Output(logits=jnp.moveaxis(images[..., 0], 1, 0) * variables["scale"])


def test_exits_by_hand():
    """The first exit is right once of three, the second twice; padding counts nowhere."""
    guesses = [[0, 1, 2, 3], [0, 4, 2, 3]]  # exit, row
    images = np.zeros((4, 2, 6, 1), np.uint8)
    for exit_, row in enumerate(guesses):
        images[np.arange(4), exit_, row, 0] = 1
    batch = {
        "image": images,
        "label": np.array([5, 4, 2, 3], np.int32),
        "mask": np.array([1, 1, 1, 0], np.float32),
    }
    as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
    for devices in (1, 4):
        found = evaluate(Exits(), {"scale": jnp.float32(1.0)}, [batch], devices, as_float)
        assert found["top1_per_exit"] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
        assert found["top1"] == found["top1_per_exit"][-1] and found["count"] == 3
        right, wrong = np.log(np.e + 5) - 1, np.log(np.e + 5)
        assert found["loss"] == pytest.approx((wrong + 2 * right) / 3, rel=1e-6)  # of the last exit
        assert set(found) == {"top1", "top1_per_exit", "top5", "loss", "count"}


def test_several_labels_by_hand():
    """Guesses 0, 2, 3, 4 and 5: one of two labels, the only one, none of two, padding, no label."""
    images = np.zeros((5, 2, 6, 1), np.uint8)
    images[np.arange(5), :, [0, 2, 3, 4, 5], 0] = 1
    fits = np.zeros((5, 6), bool)
    fits[[0, 0, 1, 2, 2, 3], [0, 5, 2, 4, 5, 4]] = True
    batch = {
        "image": images,
        "label": np.array([5, 2, 3, 4, 5], np.int32),  # 3 was ImageNet's label and is none of the true ones
        "labels": fits,
        "mask": np.array([1, 1, 1, 0, 0], np.float32),
    }
    as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
    found = evaluate(Fixed(), {"scale": jnp.float32(1.0)}, [batch], 1, as_float)
    assert found["top1"] == pytest.approx(2 / 3) and found["count"] == 3
    assert found["top5"] == 1.0  # of row 2: 3, 0, 1, 2 and 4
    right, wrong = np.log(np.e + 5) - 1, np.log(np.e + 5)
    assert found["loss"] == pytest.approx((wrong + 2 * right) / 3, rel=1e-6)  # that of `label`
    found = evaluate(Exits(), {"scale": jnp.float32(1.0)}, [batch], 1, as_float)
    assert found["top1_per_exit"] == [pytest.approx(2 / 3)] * 2
    del batch["labels"]
    found = evaluate(Fixed(), {"scale": jnp.float32(1.0)}, [batch], 1, as_float)
    assert found["top1"] == pytest.approx(2 / 3)  # row 2 in place of row 0


def test_the_compiled_step_of_a_plan_takes_several_labels():
    """A model of zeros says class 0 to everything; that fits four rows, and `label` none."""
    c = recipes.load("configs/deit.py:tiny")
    c.model.depth = 1
    plan = train.build(c, devices=jax.devices()[:1])
    assert data.info("imagenet2012_real").several_labels and not plan.info.several_labels
    several = dataclasses.replace(
        plan.eval_sets[""], info=dataclasses.replace(plan.info, several_labels=True)
    )
    plan = dataclasses.replace(plan, eval_sets={"": several})
    batch = {
        "image": np.zeros((16, 16, 16, 3), np.uint8),
        "label": np.full(16, 3, np.int32),
        "mask": np.ones(16, np.float32),
        "labels": np.arange(16)[:, None] < np.array([[4, 0, 16, 0]]),
    }
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), plan.abstract_state.variables)
    sums = plan.eval_step(meshes.replicate(zeros, plan.mesh), meshes.place(batch, plan.mesh))
    assert (float(sums["top1"]), float(sums["count"])) == (4.0, 16.0)


def test_no_top5_of_five_classes():
    batch = {
        "image": np.zeros((4, 2, 5, 1), np.uint8),
        "label": np.zeros(4, np.int32),
        "mask": np.ones(4, np.float32),
    }
    as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
    found = evaluate(Fixed(), {"scale": jnp.float32(1.0)}, [batch], 4, as_float)
    assert set(found) == {"top1", "loss", "count"} and found["loss"] == pytest.approx(np.log(5))


def test_padding_may_be_anything():
    batch = {
        "image": np.ones((4, 2, 6, 1), np.uint8),
        "label": np.zeros(4, np.int32),
        "mask": np.array([1, 0, 0, 0], np.float32),
    }

    def poison(images):
        return jnp.where(jnp.arange(len(images))[:, None, None, None] > 0, jnp.nan, images * 1.0)

    found = evaluate(Fixed(), {"scale": jnp.float32(1.0)}, [batch], 1, poison)
    assert found == {"top1": 1.0, "top5": 1.0, "loss": pytest.approx(np.log(6)), "count": 1}


def test_counts_are_exact_on_any_number_of_devices():
    """37 images in padded batches on 1 and 4 devices, against one unpadded forward pass."""
    model = dyntoken.create_model(
        "dtps_deit_tiny_patch8_16", num_classes=7, width=8, depth=2, heads=2, keep=0.5, at=(1,)
    )
    variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))
    rows = list(data.eval_batches("fake", batch=37, size=16, shards=1, **SOURCE))
    assert len(rows) == 1
    logits = np.asarray(jax.jit(lambda x: model.apply(variables, prepare(x)).logits)(rows[0]["image"]))
    order, labels = np.argsort(-logits, 1), rows[0]["label"]
    top1, top5 = (order[:, 0] == labels).sum(), (order[:, :5] == labels[:, None]).any(1).sum()
    assert 0 < top1 < top5 < 37
    for devices in (1, 4):
        batches = data.eval_batches("fake", batch=16, size=16, shards=4, **SOURCE)
        found = evaluate(model, variables, batches, devices)
        assert found["count"] == 37
        assert round(found["top1"] * 37, 6) == top1 and round(found["top5"] * 37, 6) == top5
        picked = jax.nn.log_softmax(logits)[np.arange(37), labels]
        assert found["loss"] == pytest.approx(-float(picked.mean()), rel=1e-5)


def test_only_the_sums_travel():
    mesh = meshes.data_mesh(jax.devices()[:4])
    step = meshes.data_parallel(make_eval_step(Fixed(), prepare=lambda x: x * 1.0), mesh, replicated=1)
    batch = {"image": np.zeros((8, 2, 6, 1), np.uint8), "label": np.zeros(8, np.int32), "mask": np.ones(8)}
    text = step.lower({"scale": jnp.float32(1)}, meshes.place(batch, mesh)).compile().as_text()
    kinds = re.findall(r" (all-reduce|all-gather|all-to-all|reduce-scatter)(?:-start)?\(", text)
    assert kinds == ["all-reduce"]


def test_an_empty_split_is_an_error():
    with pytest.raises(ValueError, match="no example to evaluate"):
        classify(lambda v, b: {}, {}, [])
