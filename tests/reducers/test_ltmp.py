"""LTMP: merging and pruning by thresholds, as masked and as dropped rows, and the loss on its share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import losses
from dyntoken.losses.flops_share import share_of
from dyntoken.types import Output

SMALL = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 5}
IMAGES = np.random.default_rng(7).normal(size=(2, 16, 16, 3)).astype(np.float32)
THRESHOLDS = {"merge_masker": 0.8, "prune_masker": 0.055}


@functools.cache
def _model(**options):
    return dyntoken.create_model("ltmp_deit_tiny_patch16_224", **{**SMALL, **options})


@functools.cache
def _variables(neutral=False):
    shapes = jax.eval_shape(_model().init, jax.random.key(0), IMAGES[:1])
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda s: rng.normal(s.ndim == 1, 0.3, s.shape).astype(np.float32), shapes)
    for name, reducer in tree["params"]["backbone"]["trunk"].items():
        for masker in THRESHOLDS if name.startswith("reducer") else ():
            value = float(masker == "merge_masker") if neutral else THRESHOLDS[masker]
            reducer[masker]["threshold"] = np.full(1, value, np.float32)
    return tree


@functools.cache
def _run(sample=None, neutral=False, **options):
    model, images = _model(**options), IMAGES if sample is None else IMAGES[sample : sample + 1]
    run = jax.jit(lambda v, x: model.apply(v, x, record=("features", "stages")))
    return run(_variables(neutral), images)


def test_with_the_thresholds_it_starts_with_it_is_the_dense_model():
    dense = dyntoken.create_model("deit_tiny_patch16_224", **SMALL)
    params = _variables(True)["params"]
    trunk = {k: v for k, v in params["backbone"]["trunk"].items() if k.startswith("blocks")}
    params = {**params, "backbone": {**params["backbone"], "trunk": trunk}}
    expected = jax.jit(dense.apply)({"params": params}, IMAGES).logits
    np.testing.assert_allclose(_run(neutral=True).logits, expected, atol=1e-5)
    start = jax.jit(_model().init)(jax.random.key(0), IMAGES[:1])["params"]["backbone"]["trunk"]["reducer_2"]
    assert (start["merge_masker"]["threshold"], start["prune_masker"]["threshold"]) == (1.0, 0.0)


def test_merged_rows_are_means_by_size_and_the_rest_dies_by_importance():
    out = _run()
    before, after = (np.asarray(x, np.float64)[:, 1:] for x in out.records["stages"][0])
    reduction, block = out.reductions[0], out.state.blocks[0]
    remap, alive = np.asarray(reduction.remap), np.asarray(block.mask)[:, 1:]
    best = np.asarray(block.similarity)[:, 1:]
    importance = np.asarray(block.importance)[:, 1:]
    assert (best > 0.8).any() and 0 < alive.sum() < alive.size
    np.testing.assert_array_equal(alive[:, 8:], importance[:, 8:] > 0.055)
    np.testing.assert_array_equal(alive[:, :8], (importance[:, :8] > 0.055) & (best <= 0.8))
    for b, row in np.argwhere(alive > 0):
        parts = before[b][remap[b] == row]
        np.testing.assert_allclose(after[b, row], parts.mean(axis=0), atol=1e-5)
        if row < 8:
            assert len(parts) == 1 and np.argmax(remap[b] == row) == 2 * row + 1  # an even row


def test_dropped_rows_do_not_depend_on_the_batch_and_differ_from_masked_ones():
    dropped = _run(rows="dropped")
    for sample in range(2):
        np.testing.assert_allclose(_run(sample, rows="dropped").logits[0], dropped.logits[sample], atol=1e-5)
    alive = np.asarray(dropped.tokens.alive)
    np.testing.assert_array_equal(alive, -np.sort(-alive, axis=1))  # those alive come first
    assert np.abs(_run().logits - dropped.logits).max() > 1e-3
    np.testing.assert_allclose(
        _run(neutral=True).logits, _run(neutral=True, rows="dropped").logits, atol=1e-5
    )


def test_the_loss_moves_both_thresholds_of_every_block():
    objective = losses.Objective({"ce": {}, "flops_share": {"target": 0.2, "weight": 10.0}})
    batch = {"target": jnp.eye(5)[:2]}

    def loss(params):
        out = _model().apply({"params": params}, IMAGES, train=True)
        return objective.total(objective.evaluate(out, batch))

    grads = jax.jit(jax.grad(loss))(_variables()["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path
    for block in range(3):  # lower than now is wanted: the merge threshold falls, the other rises
        reducer = grads["backbone"]["trunk"][f"reducer_{block}"]
        assert reducer["prune_masker"]["threshold"] < 0
        assert reducer["merge_masker"]["threshold"] != 0 or block == 2  # the last one merges nothing here


def test_share_of_multiply_adds():
    n, d = 4, 2
    dense = 6 * n * d**2 + n**2 * d
    expected = (2 * n * d**2 + n**2 * d + 4 * 0.5 * n * d**2) / dense
    second = (2 * 0.5 * n * d**2 + (0.5 * n) ** 2 * d + 4 * 0.25 * n * d**2) / dense
    assert share_of([0.5, 0.25], n, d) == pytest.approx((expected + second) / 2)
    with pytest.raises(ValueError, match="learnt thresholds, as ltmp_"):
        losses.LOSSES["flops_share"](Output(logits=jnp.zeros((2, 5))), {})


def test_it_has_no_gather_form():
    with pytest.raises(ValueError, match="no gather form: use form='auto' or 'mask'"):
        jax.eval_shape(lambda: _model(form="gather").init(jax.random.key(0), IMAGES))
