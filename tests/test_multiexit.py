"""Adaptive depth: exits after some blocks of one dense network."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.analysis import macs
from dyntoken.registry import UnknownNameError

TINY = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 5}
NAME = "deit_tiny_patch16_224"
IMAGES = np.random.default_rng(3).normal(size=(3, 16, 16, 3)).astype(np.float32)


@functools.cache
def _model(**more):
    return dyntoken.create_model(f"multiexit_{NAME}", **{**TINY, **more})


@functools.cache
def _variables():
    return jax.jit(_model().init)(jax.random.key(0), IMAGES[:1])


@functools.cache
def _logits():
    return jax.jit(_model().apply)(_variables(), IMAGES).logits


def test_the_last_exit_is_the_dense_model():
    dense = dyntoken.create_model(NAME, **TINY)
    params = {key: _variables()["params"][key] for key in ("backbone", "head")}
    expected = jax.jit(dense.apply)({"params": params}, IMAGES).logits
    assert _logits().shape == (3, 3, 5)
    np.testing.assert_allclose(_logits()[-1], expected, atol=1e-6)


def test_an_early_exit_reads_the_rows_after_its_block():
    dense = dyntoken.create_model(NAME, **TINY)
    params = _variables()["params"]
    found = jax.jit(functools.partial(dense.apply, record=("blocks",)))(
        {"params": {key: params[key] for key in ("backbone", "head")}}, IMAGES
    )
    x = np.asarray(found.records["blocks"][1])[:, 0]  # class token after block 1
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    early = jax.tree.map(np.asarray, params["early_1"])
    x = x * early["norm"]["scale"] + early["norm"]["bias"]
    expected = x @ early["head"]["cls"]["kernel"] + early["head"]["cls"]["bias"]
    np.testing.assert_allclose(_logits()[1], expected, atol=1e-5)


@pytest.mark.parametrize("upto", [0, 1])
def test_upto_runs_the_first_exits(upto):
    run = jax.jit(functools.partial(_model().apply, upto=upto))
    np.testing.assert_allclose(run(_variables(), IMAGES).logits, _logits()[: upto + 1], atol=1e-6)


def test_exits_one_by_one():
    upstream = None
    for index in range(3):
        step = jax.jit(functools.partial(_model().apply, index=index, method="step"))
        logits, upstream = step(_variables(), IMAGES, upstream)
        np.testing.assert_allclose(logits, _logits()[index], atol=1e-6)
    assert upstream is None
    with pytest.raises(ValueError, match="exit 1 takes the result of the exit before"):
        _model().apply(_variables(), IMAGES, index=1, method="step")


def test_an_exit_trains_the_blocks_before_it():
    def loss(params):
        return _model().apply({"params": params}, IMAGES, train=True).logits[0].sum()

    grads = jax.jit(jax.grad(loss))(_variables()["params"])
    size = {i: max(jnp.abs(g).max() for g in jax.tree.leaves(grads["backbone"]["trunk"][f"blocks_{i}"]))
            for i in range(3)}  # fmt: skip
    assert size[0] > 0 and size[1] == 0 and size[2] == 0
    assert jnp.abs(grads["early_0"]["head"]["cls"]["kernel"]).max() > 0


def test_multiply_adds_grow_by_the_blocks_between():
    dense = macs.count(dyntoken.create_model(NAME, **TINY)).total
    found = [macs.count(_model(), upto=index).total for index in range(3)]
    assert found[2] == dense + 2 * 16 * 5  # two more classifiers
    block = 17 * 12 * 16 * 16 + 2 * 17 * 17 * 16
    assert [b - a for a, b in itertools.pairwise(found)] == [block + 16 * 5] * 2


def test_default_exits_and_names():
    model = dyntoken.create_model("multiexit_deit_small")
    assert model.exits == (3, 7, 11)
    assert dyntoken.create_model("multiexit_t2t_vit_14").exits == (3, 8, 13)
    assert "multiexit_deit_small_patch16_224" in dyntoken.list_models("multiexit_*")
    assert not dyntoken.list_models("multiexit_*distilled*")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": (0, 1)}, "end with the last block, 2"),
        ({"exits": (1, 1, 2)}, "increasing block indices"),
        ({"exits": ()}, "increasing block indices"),
        ({"distilled": True}, "without distilled=True"),
        ({"keep": 0.5}, "unknown option 'keep'"),
    ],
)
def test_bad_requests_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        dyntoken.create_model(f"multiexit_{NAME}", **{**TINY, **options})


def test_bad_calls_say_what_to_do():
    with pytest.raises(ValueError, match="upto=3: this model has the exits 0 to 2"):
        _model().apply(_variables(), IMAGES, upto=3)
    with pytest.raises(UnknownNameError, match=r"unknown record 'block'.*blocks"):
        _model().apply(_variables(), IMAGES, record=("block",))
