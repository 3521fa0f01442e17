"""Token labelling and its MixToken targets, and distillation of the auxiliary logits, in literal numbers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import device_augment, losses, optim
from dyntoken.train import sharding as meshes
from dyntoken.train.state import create_state, init_variables
from dyntoken.train.step import train_step
from dyntoken.types import Output, Tokens

L3 = np.log(3.0)  # logits (L3, 0) are probabilities 3/4, 1/4


def _output(dense, *, mixed=None, alive=None, place=None):
    dense = jnp.asarray(dense, jnp.float32)
    cells = dense.shape[1] if place is None else 1 + int(np.max(place))
    tokens = Tokens.start(jnp.zeros((len(dense), cells, 1)), prefix=0)
    changes = {"x": jnp.zeros((*dense.shape[:2], 1)), "alive": alive, "mixed": mixed}
    tokens = tokens.replace(**changes, **({} if place is None else {"place": jnp.asarray(place)}))
    return Output(logits=dense[:, 0], dense=dense, tokens=tokens, mixed=mixed)


TARGET = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
DENSE = [[[L3, 0], [0, 0]], [[L3, 0], [L3, 0]]]  # two images of two tokens


def _token_label(output, **batch):
    total, count = losses.LOSSES["token_label"](output, {"target": TARGET, **batch})
    return float(total), float(count)


def test_every_token_has_the_images_target():
    # -log of 3/4 and 1/2 in the first image, twice -log 1/4 in the second
    expected = np.log(4 / 3) + np.log(2) + 2 * np.log(4)
    assert _token_label(_output(DENSE)) == (pytest.approx(expected, rel=1e-6), 4)
    assert _token_label(_output(DENSE), mask=jnp.asarray([1.0, 0.0])) == (
        pytest.approx(np.log(8 / 3), rel=1e-6),
        2,
    )


def test_swapped_cells_have_the_partners_target():
    mixed = jnp.asarray([[False, True], [False, True]])
    expected = np.log(4 / 3) + np.log(2) + np.log(4) + np.log(4 / 3)
    assert _token_label(_output(DENSE, mixed=mixed))[0] == pytest.approx(expected, rel=1e-6)
    # The class token's target is mixed by the share of swapped cells, here one half.
    total, count = losses.LOSSES["ce"](_output(DENSE, mixed=mixed), {"target": TARGET})
    assert (float(total), float(count)) == (pytest.approx(np.log(4 / 3) + np.log(4), rel=1e-6), 2)


def test_dense_labels_follow_the_place_and_dropped_tokens_have_none():
    labels = jnp.asarray([[[1.0, 0], [0, 1], [0.5, 0.5]]] * 2)
    rows = _output([[[L3, 0], [0, 0]]] * 2, place=[[2, 1], [1, -1]])  # the last is a fused token
    expected = 0.5 * np.log(4 / 3) + 0.5 * np.log(4) + np.log(2) + np.log(4)
    assert _token_label(rows, dense=labels) == (pytest.approx(expected, rel=1e-6), 3)
    masked = _output(DENSE, alive=jnp.asarray([[1.0, 0], [0, 1]]))
    assert _token_label(masked)[0] == pytest.approx(np.log(4 / 3) + np.log(4), rel=1e-6)
    with pytest.raises(
        ValueError, match=r"dense labels of shape \(2, 2, 2\) do not fit 2 images of 3 tokens"
    ):
        _token_label(rows, dense=labels[:, :2])
    with pytest.raises(ValueError, match="needs a model with an auxiliary head"):
        _token_label(Output(logits=TARGET))


def test_dense_distillation():
    student, teacher = _output(DENSE), _output([[[0.0, 0], [0, 0]]] * 2)
    total, count = losses.LOSSES["dense_distill"](student, {"teacher": teacher})
    each = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert (float(total), float(count)) == (pytest.approx(3 * each, rel=1e-5), 4)
    total, _ = losses.LOSSES["dense_distill"](student, {"teacher": teacher}, variant="mse")
    assert float(total) == pytest.approx(3 * L3**2 / 2, rel=1e-5)
    mixed = _output(DENSE, mixed=jnp.ones((2, 2), bool))
    with pytest.raises(
        ValueError, match="'dense_distill' compares with a teacher that saw the images unmixed"
    ):
        losses.LOSSES["dense_distill"](mixed, {"teacher": teacher})


SPECS = {"ce": {}, "token_label": {"weight": 0.5}}
SHAPE, CLASSES, ROWS = (8, 8, 3), 5, 8


@functools.cache
def _trained(devices):
    """LV-ViT with MixToken after two steps, on the host, and its losses."""
    options = {"img_size": 8, "patch_size": 4, "width": 8, "depth": 1, "heads": 2, "stem_width": 4}
    model = dyntoken.create_model("lvvit_s", **options, num_classes=CLASSES, mix_token=True)
    variables = jax.jit(lambda: init_variables(model, SHAPE, 0))()
    variables["params"] = jax.tree.map(lambda p: 10 * p if p.ndim == 2 else p, variables["params"])
    tx, _ = optim.make(variables["params"], total_steps=4, steps_per_epoch=2, name="sgd", lr=0.1, clip=1.0)

    def augment(key, images, labels, ids):
        return device_augment.normalize(images, (0.5,) * 3, (0.25,) * 3), device_augment.soft_targets(
            labels, CLASSES, 0.1
        )

    options = {"objective": losses.Objective(SPECS), "augment": augment, "seed": 3, "ema": 0.9}
    step = functools.partial(train_step, model=model, tx=tx, **options)
    mesh = meshes.data_mesh(jax.devices()[:devices])
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (ROWS, *SHAPE), np.uint8),
        "label": rng.integers(0, CLASSES, ROWS).astype(np.int32),
        "mask": np.ones(ROWS, np.float32),
        "id": np.arange(ROWS, dtype=np.int32),
        "dense": rng.dirichlet(np.ones(CLASSES), (ROWS, 4)).astype(np.float32),
    }
    run = meshes.data_parallel(step, mesh, replicated=2)
    state, history = meshes.replicate(create_state(variables, tx, ema=True), mesh), []
    for _ in range(2):
        state, metrics = run(state, {}, meshes.place(batch, mesh))
        history.append({name: float(a) / float(n) for name, (a, n) in jax.device_get(metrics).items()})
    return jax.device_get(state), history


@pytest.mark.thorough
def test_four_devices_train_what_one_does_statistics_included():
    (one, losses_one), (four, losses_four) = _trained(1), _trained(4)
    for a, b in zip(losses_one, losses_four, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert a["loss"] == pytest.approx(a["ce"] + 0.5 * a["token_label"], rel=1e-5)
    chex.assert_trees_all_close(one.params, four.params, atol=2e-5, rtol=0)
    chex.assert_trees_all_close(one.extra, four.extra, atol=2e-5, rtol=1e-5)
    chex.assert_trees_all_close(one.ema, four.ema, atol=2e-5, rtol=1e-5)
    assert set(one.extra) == {"batch_stats"} and "batch_stats" in one.ema
    stats = one.extra["batch_stats"]["backbone"]["patch_embed"]["bn1"]
    assert float(np.abs(stats["mean"]).max()) > 1e-3 and float(np.abs(stats["var"] - 1).max()) > 1e-3
