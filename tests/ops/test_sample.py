import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.ops import sample


def _draws(ids, key=0):
    return sample.Draws(jax.random.key(key), jnp.asarray(ids, jnp.int32))


def test_draws_belong_to_the_example_not_to_its_place_in_the_batch():
    whole = _draws([0, 1, 2, 3]).gumbel((5, 2), 1, 0)
    half = _draws([2, 3]).gumbel((5, 2), 1, 0)
    np.testing.assert_array_equal(whole[2:], half)
    assert not np.array_equal(whole[0], whole[1])
    assert not np.array_equal(whole, _draws([0, 1, 2, 3]).gumbel((5, 2), 2, 0))


def test_gumbel_softmax_is_exactly_one_hot_over_any_number_of_classes():
    for classes in (2, 5):
        logits = jax.random.normal(jax.random.key(1), (400, classes))
        noise = jax.random.gumbel(jax.random.key(2), logits.shape)
        y = sample.gumbel_softmax(logits, noise)
        assert set(np.unique(y)) == {0.0, 1.0}
        np.testing.assert_array_equal(y.sum(axis=-1), 1.0)
        np.testing.assert_array_equal(y.argmax(axis=-1), (logits + noise).argmax(axis=-1))


def test_gumbel_softmax_gradient_is_that_of_the_soft_sample():
    logits, noise = jnp.array([0.3, -0.2, 0.1]), jnp.array([0.5, 1.0, -0.4])
    for temperature in (1.0, 0.5):
        hard, soft = (
            jax.jacobian(
                lambda x, h=h, t=temperature: sample.gumbel_softmax(x, noise, temperature=t, hard=h)
            )(logits)
            for h in (True, False)
        )
        np.testing.assert_allclose(hard, soft, atol=1e-7)


def test_gumbel_softmax_literal():
    soft = sample.gumbel_softmax(jnp.log(jnp.array([1.0, 3.0])), jnp.zeros(2), hard=False)
    np.testing.assert_allclose(soft, [0.25, 0.75], rtol=1e-6)
    cold = sample.gumbel_softmax(jnp.log(jnp.array([1.0, 3.0])), jnp.zeros(2), temperature=0.5, hard=False)
    np.testing.assert_allclose(cold, [0.1, 0.9], rtol=1e-6)


@hypothesis.given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 5))
def test_permutation_moves_only_rows_alive(alive, key):
    alive = np.array([alive], np.float32)
    rows = np.asarray(sample.permutation(jnp.asarray(alive), _draws([7], key), 0))
    assert sorted(rows[0].tolist()) == list(range(6))
    np.testing.assert_array_equal(rows[0][alive[0] == 0], np.flatnonzero(alive[0] == 0))


def test_dropout_and_drop_path_keep_the_mean():
    x = jnp.ones((64, 8, 8))
    draws = _draws(range(64))
    dropped = sample.dropout(x, 0.25, draws, 3)
    assert set(np.unique(dropped).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(dropped.mean()) - 1.0) < 0.05
    path = sample.drop_path(x, 0.5, draws, 3, 1)
    np.testing.assert_array_equal(path, np.broadcast_to(path[:, :1, :1], x.shape))  # whole examples
    assert set(np.unique(path).tolist()) == {0.0, 2.0}
