"""T2T-ViT: soft splits, both kinds of steps, positions, and reducers in its trunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dyntoken
from dyntoken.backbones import t2t
from dyntoken.ops import unfold

TINY = {"img_size": 32, "tokens": 4, "width": 16, "depth": 2, "heads": 2, "token_dim": 8, "num_classes": 5}

IMAGES = np.random.default_rng(7).normal(size=(2, 32, 32, 3)).astype(np.float32)


@functools.cache
def _variables(name):
    return jax.jit(dyntoken.create_model(name, **TINY).init)(jax.random.key(0), IMAGES[:1])


def test_unfold_orders_channels_first():
    x = jnp.arange(2 * 3 * 2.0).reshape(1, 2, 3, 2)  # cell (y, x) holds (6y + 2x, 6y + 2x + 1)
    windows = unfold.unfold(x, (2, 2), (1, 1), (0, 1))
    assert windows.shape == (1, 1, 4, 8)
    np.testing.assert_array_equal(windows[0, 0, 1], [0, 2, 6, 8, 1, 3, 7, 9])
    np.testing.assert_array_equal(windows[0, 0, 0], [0, 0, 0, 6, 0, 1, 0, 7])


def test_official_first_splits():
    found = [t2t.first_split(224, tokens) for tokens in (7, 10, 14)]
    assert found == [(14, 8, 3), (11, 6, 5), (7, 4, 2)]


def test_every_grid_that_fits_has_a_split():
    for size in range(16, 257, 3):
        for tokens in range(1, size // 4 + 1):
            kernel, stride, padding = t2t.first_split(size, tokens)
            windows = unfold.count(size, kernel, stride, padding)
            assert -(-windows // 4) == tokens and stride <= kernel and padding < kernel, (size, tokens)
    with pytest.raises(ValueError, match="9 T2T tokens need at least 36 pixels, got 32"):
        t2t.first_split(32, 9)


def test_positions_are_the_sinusoid():
    table = t2t.sinusoid(3, 4)
    np.testing.assert_allclose(table[0], [0, 1, 0, 1])
    np.testing.assert_allclose(table[2], [np.sin(2), np.cos(2), np.sin(0.02), np.cos(0.02)], rtol=1e-6)
    params = _variables("t2t_vit_7")["params"]["backbone"]
    np.testing.assert_array_equal(params["pos_embed"][0], t2t.sinusoid(17, 16))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14"])
def test_gradients_reach_all_but_the_fixed_parameters(name):
    model, variables = dyntoken.create_model(name, **TINY), _variables(name)
    loss = lambda v: (jax.nn.log_softmax(model.apply(v, IMAGES, train=True).logits) ** 2).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(variables)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        fixed = key.endswith(("/w", "/pos_embed"))
        assert np.isfinite(leaf).all() and (float(jnp.abs(leaf).max()) > 0) != fixed, key


def test_performer_features_are_fixed_orthogonal_rows():
    w = np.asarray(_variables("t2t_vit_7")["params"]["backbone"]["tokens_to_token"]["attention1"]["w"])
    np.testing.assert_allclose(w @ w.T, 4 * np.eye(4), atol=1e-5)


@pytest.mark.filterwarnings("ignore:images hold values beyond 50")
def test_performer_stays_finite_in_bfloat16():
    model = dyntoken.create_model("t2t_vit_7", **TINY, dtype="bfloat16")
    out = jax.jit(lambda v: model.apply(v, 30 * IMAGES, record=("embed",)))(_variables("t2t_vit_7"))
    assert out.records["embed"].dtype == jnp.bfloat16 and np.isfinite(out.logits).all()


@pytest.mark.parametrize("method", ["dtps", "evit"])
def test_reducers_work_in_its_trunk(method):
    name = f"{method}_t2t_vit_7"
    variables = _variables(name)
    logits = []
    for form in ("mask", "gather"):
        model = dyntoken.create_model(name, **TINY, at=(1,), keep=0.5, form=form)
        out = jax.jit(model.apply)(variables, IMAGES)
        assert out.reductions[0].carrier.shape == (2, 16)
        logits.append(out.logits)
    assert out.reductions[0].keep.shape == (2, 8)
    np.testing.assert_allclose(*logits, atol=1e-5)


@pytest.mark.thorough
def test_parameter_counts_of_the_published_models():
    counts = {
        "t2t_vit_7": 4_310_222,
        "t2t_vit_10": 5_889_230,
        "t2t_vit_12": 6_941_902,
        "t2t_vit_14": 21_545_550,
        "t2t_vit_19": 39_177_422,
        "t2t_vit_24": 64_105_934,
        "t2t_vit_t_14": 21_541_070,
    }
    found = {}
    for name in counts:
        images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        shapes = jax.eval_shape(dyntoken.create_model(name).init, jax.random.key(0), images)
        found[name] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert found == counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_type": "x"}, "tokens_type is 'x': known: convolution, performer, transformer"),
        ({"tokens": (4, 9)}, "9 T2T tokens need at least 36 pixels"),
        ({"patch_size": 4}, "unknown option 'patch_size'"),
    ],
)
def test_bad_requests_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        model = dyntoken.create_model("t2t_vit_7", **{**TINY, **options})
        jax.eval_shape(model.init, jax.random.key(0), IMAGES[:1])
