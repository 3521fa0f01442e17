"""The timing of the input."""

import importlib.util

import pytest

from dyntoken import data
from dyntoken.data import input_speed

pytest.importorskip("tensorflow")
DEIT = {"rand_augment": "rand-m9-mstd0.5-inc1", "repeats": 3}


def test_absent_photographs_are_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.MissingDataError, match="pip install scikit-image scikit-learn"):
        input_speed.photographs()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in input_speed.PHOTOGRAPHS), reason="no photographs"
)
def test_measure():
    speed = input_speed.measure(DEIT, size=64, batch=8, steps=2, rounds=1)
    assert speed.decode > 0 and speed.full > 0 and 0 < speed.ratio < 2
    assert speed.ratio == pytest.approx(speed.full / speed.decode)
    assert 30 < speed.kilobytes < 200
