"""Evo-ViT: who waits, what comes back, in both forms, and the keys of its official state dict."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import losses, weights

SMALL = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 5, "at": (1,)}
HEAD = {"pool": "mean", "final_norm": False, "fc_norm": True, "token_head": True}
IMAGES = np.random.default_rng(7).normal(size=(2, 16, 16, 3)).astype(np.float32)
RECORD = ("blocks", "stages", "features")


@functools.cache
def _model(**options):
    return dyntoken.create_model("evovit_deit_tiny_patch16_224", **{**SMALL, **HEAD, **options})


@functools.cache
def _variables():
    shapes = jax.eval_shape(_model().init, jax.random.key(0), IMAGES[:1])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.15, s.shape), s.dtype), shapes)


@functools.cache
def _run(**options):
    model = _model(**options)
    return jax.jit(lambda v, x: model.apply(v, x, record=RECORD))(_variables(), IMAGES)


def test_rows_wait_unchanged_and_come_back_behind_the_others():
    out = _run()
    before, after = out.records["stages"][0]
    scores = np.asarray(out.reductions[0].scores)
    order = np.argsort(-scores, axis=1, kind="stable")
    np.testing.assert_array_equal(out.reductions[0].keep, order[:, :8])
    assert after.shape == (2, 9, 16) and [x.shape[1] for x in out.records["blocks"]] == [17, 9, 9]
    np.testing.assert_array_equal(out.tokens.place, order)
    waiting = np.take_along_axis(np.asarray(before[:, 1:]), order[:, 8:, None], axis=1)
    np.testing.assert_array_equal(out.tokens.x[:, 9:], waiting)
    np.testing.assert_array_equal(out.tokens.size, np.ones((2, 16)))


def test_the_representative_row_hands_its_change_to_all_that_wait():
    plain, out = _run(), _run(representative=True)
    before, after = out.records["stages"][0]
    order = np.asarray(out.tokens.place)
    scores = np.take_along_axis(np.asarray(out.reductions[0].scores), order, axis=1)[:, 8:]
    waiting = np.take_along_axis(np.asarray(before[:, 1:]), order[:, 8:, None], axis=1)
    mean = (waiting * scores[..., None]).sum(axis=1) / scores.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(after[:, -1], mean, atol=1e-6)
    change = np.asarray(out.records["blocks"][-1])[:, -1] - mean
    np.testing.assert_allclose(out.tokens.x[:, 9:], waiting + change[:, None], atol=1e-5)
    assert out.reductions[0].count == 9 and not np.allclose(plain.logits, out.logits)


@pytest.mark.parametrize("options", [{"representative": True}, {"put_back": False}])
def test_both_forms_agree(options):
    np.testing.assert_allclose(_run(**options).logits, _run(**options, form="mask").logits, atol=1e-5)


def test_the_class_token_has_a_classifier_in_training_alone():
    model = _model()
    batch = {"target": jax.nn.one_hot(jnp.asarray([1, 3]), 5)}

    def loss(params):
        out = model.apply({"params": params}, IMAGES, train=True)
        value, count = losses.LOSSES["ce"](out, batch)
        return value / count, out

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(_variables()["params"])
    assert out.heads.shape == (2, 2, 5) and _run().heads is None
    np.testing.assert_array_equal(out.logits, out.heads[0])
    log_p = np.asarray(jax.nn.log_softmax(out.heads))
    np.testing.assert_allclose(value, -(log_p[:, 0, 1] + log_p[:, 1, 3]).mean() / 2, rtol=1e-5)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_official_keys_there_and_back():
    flat = weights.export_reference(_model(), _variables())
    assert flat["qks.2.qk.weight"].shape == (32, 16) and flat["vs.0.v.bias"].shape == (16,)
    assert {"norms.0.weight", "projs.1.bias", "norm.weight", "norm_cls.bias", "head_cls.weight"} <= set(flat)
    kernel = np.asarray(_variables()["params"]["backbone"]["trunk"]["blocks_2"]["attn"]["qkv"]["kernel"])
    np.testing.assert_array_equal(flat["vs.2.v.weight"], kernel[:, 32:].T)
    constructor = {
        **{"img_size": 16, "patch_size": 4, "embed_dim": 8, "num_heads": 2, "num_classes": 5},
        **{"prune_ratio": [1.0] * 4 + [0.4] * 8, "mlp_ratio": 1.0},
    }
    of = ("YifanXu74/Evo-ViT", "EvoVisionTransformer", constructor)
    model = weights.official.build(*of).model
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES[:1]))
    made = jax.tree.map(lambda s: np.arange(np.prod(s.shape), dtype=np.float32).reshape(s.shape), shapes)
    found, variables = weights.import_reference(*of, weights.export_reference(model, made))
    jax.tree.map(np.testing.assert_array_equal, variables["params"], made["params"])
    assert (found.at, found.keep, found.clone() == model) == ((4, 8), (0.4, 0.4), True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("evovit_deit_tiny", {"at": (0, 4)}, "sites begin at 1"),
        ("evovit_pvt_tiny", {}, "not one stack"),
        ("evovit_deit_tiny", {"class_token": False, "pool": "mean"}, "class token, and there is none"),
        ("evovit_psvit_ti_14", {"token_head": True, "class_token": False, "pool": "mean"}, "class token"),
        ("evovit_deit_tiny", {"tradeoff": 1.5}, "tradeoff"),
    ],
)
def test_bad_requests_say_what_to_do(name, options, message):
    with pytest.raises(ValueError, match=message):
        dyntoken.create_model(name, **options)


def test_a_tradeoff_per_block_needs_every_block():
    with pytest.raises(ValueError, match="no entry for block 2: give one per block"):
        jax.eval_shape(lambda: _model(tradeoff=(1.0, 0.5)).init(jax.random.key(0), IMAGES))
