"""What is kept of each image, the calibration error, and the tables."""

from __future__ import annotations

import csv
import io

import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.eval import answers

NAMES = ("cat", "dog", "owl")
# [2 exits, 4 images, 3 classes]; the last image is padding.
LOGITS = np.log(
    [
        [[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [1, 1, 1]],
        [[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.3, 0.1, 0.6], [1, 1, 1]],
    ]
)
BATCH = {"label": jnp.array([0, 1, 0, 0]), "mask": jnp.array([1.0, 1.0, 1.0, 0.0])}


@pytest.fixture
def found():
    rows = {name: np.asarray(value) for name, value in answers.rows(jnp.asarray(LOGITS), BATCH).items()}
    real = rows.pop("mask") > 0
    names = np.array(["a.png", "b.png", 'c"x.png'], object)
    return answers.Answers(name=names, **{name: value[real] for name, value in rows.items()})


def test_rows_by_hand(found):
    assert found.top.tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1]]
    np.testing.assert_allclose(found.prob[1], [0.7, 0.2, 0.1], rtol=1e-5)
    np.testing.assert_allclose(found.confidence, [[0.6, 0.7], [0.5, 0.7], [0.8, 0.6]], rtol=1e-5)
    assert found.right.tolist() == [[True, True], [False, True], [False, False]]
    assert found.exit.tolist() == [0, 1, 0]  # the second image is a dog only at the last exit
    single = answers.rows(jnp.asarray(LOGITS[0]), BATCH)
    assert single["confidence"].shape == (4, 1) and single["exit"].tolist() == [0] * 4


def test_several_labels_may_be_right():
    labels = jnp.array([[True, False, False], [True, True, False], [False, False, True], [False] * 3])
    rows = answers.rows(jnp.asarray(LOGITS[0]), {**BATCH, "labels": labels})
    assert rows["right"][:, 0].tolist() == [True, True, True, False]


def test_calibration_error_by_hand(found):
    """Guo et al., section 2: bins (0, 0.1], ..., (0.9, 1]."""
    confidence = np.array([0.95, 0.85, 0.85, 0.15])
    right = np.array([True, True, False, False])
    expected = (1 * abs(0.95 - 1) + 2 * abs(0.85 - 0.5) + 1 * abs(0.15 - 0)) / 4
    assert answers.calibration_error(confidence, right, bins=10) == pytest.approx(expected)
    assert answers.calibration_error(np.array([0.5, 0.5]), np.array([True, False])) == 0.0
    assert answers.calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0.0  # both edges
    told = found.calibration()
    assert told["ece"] == told["ece_per_exit"][-1] == pytest.approx((abs(1.4 - 2) + 0.6) / 3)


def test_tables(found):
    first, second, third = csv.DictReader(io.StringIO(answers.predictions_csv(found, NAMES)))
    assert list(first) == [
        *("file", "label", "right", "class_1", "probability_1", "class_2", "probability_2"),
        *("class_3", "probability_3", "exit", "confidence_exit_0", "confidence_exit_1"),
    ]
    assert (first["file"], first["class_1"], first["probability_1"]) == ("a.png", "cat", "0.7000")
    assert (second["exit"], second["right"]) == ("1", "1")
    assert (third["file"], third["label"], third["class_1"], third["right"]) == ('c"x.png', "cat", "owl", "0")
    assert found.confusion(3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    cat, dog = csv.DictReader(io.StringIO(answers.classes_csv(found, NAMES, 3)))
    assert cat == {
        **{"class": "cat", "images": "2", "accuracy": "0.5000", "mean_confidence": "0.6500"},
        **{"taken_for": "owl", "times": "1"},
    }
    assert (dog["class"], dog["accuracy"], dog["taken_for"], dog["times"]) == ("dog", "1.0000", "", "0")
    assert "\n1,1,1.0000" in answers.classes_csv(found, (), 3)  # no names: numbers
