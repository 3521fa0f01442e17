"""Neighbours and linear probe: literal votes, separable classes."""

import numpy as np
import pytest

from dyntoken.analysis import probes


def test_the_nearest_decides_and_weights_count():
    gallery = np.array([[1.0, 0.0], [0.0, 2.0], [0.1, 1.0], [1.0, 0.1]])
    labels = np.array([0, 1, 1, 0])
    queries = np.array([[3.0, 0.3], [0.0, 0.5]])
    assert probes.neighbours(gallery, labels, queries, 2, k=1).tolist() == [0, 1]
    assert probes.neighbours(gallery, labels, queries, 2, k=99).tolist() == [0, 1]
    # One very near neighbour outweighs two far ones at a low temperature, not at a high one.
    gallery = np.array([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    one = {"gallery": gallery, "labels": np.array([0, 1, 1]), "queries": np.array([[1.0, 0.0]]), "classes": 2}
    assert probes.neighbours(**one, k=3, temperature=0.07).tolist() == [0]
    assert probes.neighbours(**one, k=3, temperature=10.0).tolist() == [1]


@pytest.mark.parametrize("probe", list(probes.PROBES))
def test_separable_classes_are_told_apart(probe):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 8)) * 4
    labels, asked = rng.integers(0, 3, 60), rng.integers(0, 3, 30)
    gallery = centres[labels] + rng.normal(size=(60, 8))
    queries = centres[asked] + rng.normal(size=(30, 8))
    assert (probes.PROBES[probe](gallery, labels, queries, 3) == asked).all()


def test_a_logistic_classifier_separates_and_reads_features_as_they_are():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    centres = np.array([[50.0, 0.0], [0.0, 0.1], [-50.0, 0.0]])
    features = centres[labels] + rng.normal(size=(300, 2)) * [5.0, 0.01]
    kernel, bias = probes.logistic(features, labels, 3)
    assert kernel.shape == (2, 3) and bias.shape == (3,) and kernel.dtype == np.float32
    logits = features @ kernel + bias
    assert (logits.argmax(axis=1) == labels).mean() > 0.99
    np.testing.assert_allclose(
        bias.sum() + (features.mean(axis=0) @ kernel).sum(), 0.0, atol=1e-3
    )  # shift-free
