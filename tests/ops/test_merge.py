"""Who merges into whom, and what groups become: literal numbers, and a loop in numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.ops import merge

one_way = jax.jit(merge.one_way, static_argnums=3, static_argnames="ascending")
both_ways = jax.jit(merge.both_ways, static_argnums=3)
# Rows 0 2 4 are sources, 1 3 targets; source 2 fits 3 best of all, then 0 fits 1, then 4 fits 1.
SCORES = jnp.asarray([[[0.8, 0.1], [0.2, 0.9], [0.7, 0.3]]])
SOURCES, TARGETS = np.array([0, 2, 4], np.int32), np.array([1, 3], np.int32)


def test_even_and_odd_places_count_the_prefix():
    for prefix, sources in ((0, [0, 2, 4]), (1, [1, 3]), (2, [0, 2, 4])):
        found = merge.halves(5, prefix)
        assert found[0].tolist() == sources
        assert sorted(np.concatenate(found)) == [0, 1, 2, 3, 4]


def test_the_best_sources_go_into_their_best_target():
    found = one_way(SCORES, SOURCES, TARGETS, 2)
    np.testing.assert_array_equal(found.keep, [[4, 1, 3]])
    np.testing.assert_array_equal(found.remap, [[1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(np.sort(found.gone), [[0, 2]])
    np.testing.assert_allclose(found.similarity, [[0.8, -1, 0.9, -1, 0.7]])
    by_score = one_way(SCORES, SOURCES, TARGETS, 0, ascending=False)
    np.testing.assert_array_equal(by_score.keep, [[2, 0, 4, 1, 3]])


def test_targets_that_took_some_go_on_the_other_way():
    found = both_ways(SCORES, SOURCES, TARGETS, 2)  # 2 into 3; then the best target of what stays: 1 into 0
    np.testing.assert_array_equal(found.keep, [[0, 4, 3]])
    np.testing.assert_array_equal(found.remap, [[0, 0, 2, 2, 1]])
    found = both_ways(SCORES, SOURCES, TARGETS, 3)  # 2 into 3, 1 into 0, and 3 with 2 in it into 4
    np.testing.assert_array_equal(found.keep, [[0, 4]])
    np.testing.assert_array_equal(found.remap, [[0, 0, 1, 1, 1]])


def test_groups_become_means_or_the_largest():
    found = one_way(SCORES, SOURCES, TARGETS, 2)
    x = jnp.asarray([[[1.0], [2.0], [3.0], [4.0], [5.0]]])
    weight = jnp.asarray([[3.0, 1.0, 1.0, 1.0, 2.0]])
    np.testing.assert_allclose(merge.mean(x, found)[..., 0], [[5, 1.5, 3.5]])
    np.testing.assert_allclose(merge.mean(x, found, weight)[..., 0], [[5, 1.25, 3.5]])
    np.testing.assert_allclose(merge.largest(x, found)[..., 0], [[5, 2, 4]])
    again = merge.of_remap(found.keep, found.remap)
    np.testing.assert_allclose(merge.mean(x, again, weight), merge.mean(x, found, weight))


def test_an_all_zero_row_has_a_finite_unit_and_gradient():
    value, grad = jax.value_and_grad(lambda x: merge.unit(x).sum())(jnp.asarray([[0.0, 0.0], [3.0, 4.0]]))
    np.testing.assert_allclose(value, 1.4, rtol=1e-6)
    assert np.isfinite(grad).all()
