"""Methods that merge a few rows at every block: their counts, addresses, weights, and what they refuse."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken import losses
from dyntoken.ops import backend
from dyntoken.reducers import diffrate
from dyntoken.reducers.tome import pairs_per_site
from dyntoken.types import Attended, Tokens

SMALL = {"img_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2, "num_classes": 5}
IMAGES = np.random.default_rng(3).normal(size=(2, 16, 16, 3)).astype(np.float32)
MERGING = ("tome", "pitome", "tofu", "diffrate", "mctf")


def _counts(name, **options):
    model = dyntoken.create_model(f"{name}_deit_tiny_patch16_224", **{**SMALL, **options})
    return [site.reducer["keep"] for site in model.sites()]


def test_r_is_a_number_a_slope_or_one_per_block():
    assert pairs_per_site(4, 3) == (4, 4, 4)
    assert pairs_per_site((5, -1.0), 6) == (10, 8, 6, 4, 2, 0)
    assert pairs_per_site((5, 1.0), 6) == (0, 2, 4, 6, 8, 10)
    assert pairs_per_site((8, 0, 4), 5) == (8, 0, 4, 0, 0)
    assert _counts("tome", r=3) == [13, 10, 7]
    assert _counts("tome", r=16) == [8, 4, 2]  # at most half merge
    assert _counts("tome", r=(3, 1)) == [13, 12, 12]
    assert _counts("mctf", r=0.25) == [12, 9]  # from block 1 on; 10 rows stay, the class row counted
    assert _counts("mctf", r=2, at=(0, 1, 2)) == [14, 12, 10]
    assert _counts("pitome", rate=0.75) == [12, 9, 7]
    assert _counts("tofu", rate=0.75) == [12, 9, 7]


def test_one_keep_rate_is_what_three_sites_would_each_keep():
    assert _counts("tome", keep=0.6) == [10, 6, 4]  # as EViT: ceil(r n) three times
    body = dyntoken.create_model("tome_deit_small", keep=0.7)
    counts = [site.reducer["keep"] for site in body.sites()]
    assert len(counts) == 12 and abs(counts[-1] - 0.7**3 * 196) < 12
    assert _counts("tome", keep=(9, 9, 5)) == [9, 9, 5]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tome", {"r": (1, 1, 1, 1)}, "r=.* has 4 entries for 3 sites"),
        ("tome", {"r": (4, -3.0)}, "inflection between -1.0 and 1.0"),
        ("mctf", {"r": -1}, "r=-1.* must be at least 0"),
        ("mctf", {"form": "mask"}, "MCTF has no mask form"),
        ("diffrate", {"class_token": False, "pool": "mean"}, "it ranks patches by the class token"),
    ],
)
def test_bad_requests_say_what_to_do(name, options, message):
    with pytest.raises(ValueError, match=message):
        model = dyntoken.create_model(f"{name}_deit_tiny_patch16_224", **{**SMALL, **options})
        jax.eval_shape(model.init, jax.random.key(0), IMAGES)


def test_a_keep_that_merges_more_than_half_is_refused_when_it_runs():
    model = dyntoken.create_model("tome_deit_tiny_patch16_224", **SMALL, keep=(5, 5, 5))
    with pytest.raises(ValueError, match="at most 8 merge at a site: keep at least 8"):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES)


@pytest.mark.parametrize("arch", ["pvt_tiny", "cvt_13", "swin_tiny", "convnext_tiny"])
@pytest.mark.parametrize("name", MERGING)
def test_backbones_with_stages_refuse(name, arch):
    with pytest.raises(ValueError, match="makes no sense in"):
        dyntoken.create_model(f"{name}_{arch}")


@functools.cache
def _reduced(name, prefix, n, keep, **options):
    reducer = dyntoken.make_reducer(name, keep=keep, block=1, depth=2, **options)

    @jax.jit
    def run(x, probs):
        tokens = Tokens.start(x, prefix=prefix)
        keys = jnp.stack([x, x**2], axis=1)
        seen = Attended(cls=probs[:, :, 0, prefix:].mean(axis=1), keys=keys, probs=probs)
        return reducer.apply({}, tokens, seen)

    return run


CASES = [(name, prefix, 9, keep) for name in MERGING for prefix, keep in ((1, 6), (2, 9))]


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.sampled_from(CASES), st.integers(0, 1000))
def test_every_patch_has_one_address(case, seed):
    name, prefix, n, keep = case
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(2, prefix + n, 4)), jnp.float32)
    probs = jax.nn.softmax(jnp.asarray(rng.normal(size=(2, 2, prefix + n, prefix + n)), jnp.float32))
    tokens, reduction = _reduced(name, prefix, n, keep)(x, probs)
    carrier, size = np.asarray(tokens.carrier), np.asarray(tokens.size)
    np.testing.assert_array_equal(size.sum(axis=1), (carrier >= 0).sum(axis=1))
    np.testing.assert_array_equal(
        np.take_along_axis(carrier, np.asarray(tokens.place), axis=1), [range(keep)] * 2
    )
    np.testing.assert_array_equal(tokens.x[:, :prefix], x[:, :prefix])
    np.testing.assert_array_equal(
        tokens.place, np.take_along_axis(np.asarray(reduction.keep), np.tile(range(keep), (2, 1)), 1)
    )
    assert (carrier >= 0).all() or name == "diffrate"


@pytest.mark.thorough
def test_sizes_weigh_keys_as_copies_would():
    model = dyntoken.create_model("tome_deit_tiny_patch16_224", **{**SMALL, "depth": 1})
    body = model.bind(model.init(jax.random.key(0), IMAGES[:1])).body.trunk.blocks_0
    x = jax.random.normal(jax.random.key(1), (1, 4, 16))
    variables = {"params": body.attn.variables["params"]}
    attention = body.attn.clone(parent=None)
    once = attention.apply(variables, x, size=jnp.asarray([[1.0, 1.0, 3.0, 1.0]]))[0]
    copies = attention.apply(variables, jnp.concatenate([x, x[:, 2:3], x[:, 2:3]], axis=1))[0]
    np.testing.assert_allclose(once, copies[:, :4], atol=1e-6)
    with backend.trace_for("gpu"):
        again = attention.apply(variables, x, size=jnp.asarray([[1.0, 1.0, 3.0, 1.0]]))[0]
    np.testing.assert_allclose(again, once, atol=1e-6)


def test_tofu_keeps_the_largest_norm_of_a_group():
    x = jnp.asarray([[[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [-1.0, -1.0], [-1.0, 1.0]]])
    seen = Attended(keys=jnp.asarray([[[[0, 0], [1, 0], [1, 0.1], [-1, 0], [0, 1]]]], jnp.float32))
    for reference, norm in ((False, 4.0), (True, 2.5 * 4 / 3)):
        late = dyntoken.make_reducer("tofu", keep=3, block=4, depth=5, reference=reference)
        tokens, _ = late.apply({}, Tokens.start(x), seen)
        merged = int(tokens.carrier[0, 0]) + 1
        np.testing.assert_allclose(float(jnp.linalg.norm(tokens.x[0, merged])), norm, rtol=1e-5)
    early = dyntoken.make_reducer("tofu", keep=3, block=0, depth=5)
    np.testing.assert_array_equal(early.apply({}, Tokens.start(x), seen)[0].x[0, merged], [3.0, 0.0])


def test_diffrate_never_weighs_a_key_below_one_unless_as_the_code_does():
    x = jnp.asarray([[[0.0, 0.0], [1.0, 0.0], [0.9, 0.1], [-1.0, 0.2]]])
    seen = Attended(cls=jnp.asarray([[0.5, 0.3, 0.2]]))
    for reference, weight in ((False, 3.0), (True, 1 + 0.99388373 - 0.98058068)):
        reducer = dyntoken.make_reducer("diffrate", keep=1, prune=(3,), reference=reference)
        tokens, _ = reducer.apply({}, Tokens.start(x), seen)
        np.testing.assert_allclose(tokens.weight, [[weight]], rtol=1e-5)
        np.testing.assert_array_equal(tokens.size, [[3]])


@functools.cache
def _learning():
    model = dyntoken.create_model("diffrate_deit_tiny_patch16_224", **SMALL, learn=True)
    return model, jax.jit(model.init)(jax.random.key(0), IMAGES)


@pytest.mark.thorough
def test_learnt_counts_train_and_read_off():
    model, variables = _learning()
    objective = losses.Objective({"ce": {}, "multiply_adds": {"gmacs": 1e-4, "weight": 1e6}})

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        out = model.apply({"params": params}, IMAGES, train=True, record=("features",))
        return objective.total(objective.evaluate(out, {"target": jnp.eye(5)[:2]}))

    value, grads = loss(variables["params"])
    assert np.isfinite(value)
    assert float(jnp.abs(grads["backbone"]["trunk"]["reducer_1"]["merge"]).max()) > 0
    found = diffrate.learnt_counts(model, variables["params"])
    assert found == {"keep": (16, 10, 10), "prune": (16, 10, 10)}  # means of 16, 12, 8 and 4
    out = jax.eval_shape(
        dyntoken.create_model("diffrate_deit_tiny_patch16_224", **SMALL, **found).apply, variables, IMAGES
    )
    assert [r.count for r in out.reductions] == [16, 10, 10]


def test_losses_of_these_methods_say_what_they_need():
    model, variables = _learning()
    shapes = functools.partial(
        jax.eval_shape,
        lambda v, x: losses.Objective({"multiply_adds": {"gmacs": 1.0}}).evaluate(
            model.apply(v, x, record=("features",)), {"target": jnp.eye(5)[:2]}
        ),
    )
    with pytest.raises(ValueError, match="with learn=True"):
        shapes(variables, IMAGES)  # evaluation goes by given counts
    with pytest.raises(ValueError, match="needs a teacher"):
        jax.eval_shape(
            lambda v, x: losses.Objective({"consistency": {}}).evaluate(
                model.apply(v, x, record=("features",)), {"target": jnp.eye(5)[:2]}
            ),
            variables,
            IMAGES,
        )


def test_tome_sorts_what_stays_by_place_or_without_a_class_token_by_similarity():
    x = np.random.default_rng(0).normal(size=(1, 9, 4)).astype(np.float32)
    probs = jnp.full((1, 2, 9, 9), 1 / 9)
    keys = (x + x**2)[0] / 2
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    best = (keys[::2] @ keys[1::2].T).max(axis=1)
    kept = np.argsort(-best)[2:] * 2  # of the sources 0, 2, 4, 6, 8 the two most similar merge
    _, reduction = _reduced("tome", 0, 9, 7)(jnp.asarray(x), probs)
    np.testing.assert_array_equal(reduction.keep[0], [*kept, 1, 3, 5, 7])
    _, reduction = _reduced("tome", 1, 8, 6)(jnp.asarray(x), probs)  # row 0, the class token, is none of them
    assert (np.diff(np.asarray(reduction.keep)[0][:2]) > 0).all()
