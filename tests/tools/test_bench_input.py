"""`tools.bench_input`: which input is timed, and what is printed."""

from __future__ import annotations

import importlib.util
import json

import pytest

from dyntoken import data
from dyntoken.tools import bench_input


@pytest.fixture
def known_speed(monkeypatch):
    """Replaces the measurement, not the recipe: 500 against 300 images per second."""
    asked = []

    def measure(augment, **request):
        asked.append((augment, request))
        speed = {"decode_images_per_s": 500.0, "input_images_per_s": 300.0}
        return {**speed, "ratio": 0.6, "cpu_ratio": 0.55, "kilobytes": 110.0}

    monkeypatch.setattr(bench_input, "time_input", measure)
    return asked


def test_the_input_of_a_recipe_is_timed(known_speed, capsys):
    assert bench_input.main(["configs/tps_deit.py", "--steps=2", "--rounds=1", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    ((augment, request),) = known_speed
    assert request == {"size": 224, "batch": 64, "steps": 2, "rounds": 1}
    assert augment == got["augment"]
    assert (augment["rand_augment"], augment["repeats"]) == ("rand-m9-mstd0.5-inc1", 3)
    assert (got["decode_images_per_s"], got["input_images_per_s"], got["ratio"]) == (500.0, 300.0, 0.6)


def test_the_comparison_as_text(known_speed, capsys):
    assert bench_input.main(["configs/dynamicvit_deit.py", "--batch=32"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("input of configs/dynamicvit_deit.py, 224 px, batch 32, ")
    assert "decoding alone       500\n" in text and "whole input          300\n" in text
    assert "0.60 of the rate of decoding alone (median of 3 rounds), at 0.55 by processor time" in text


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("configs/deit.py:demo", "configs/deit.py:demo trains on images in memory"),
        ("configs/nothing.py", "no recipe configs/nothing.py"),
    ],
)
def test_errors_say_what_to_do(recipe, words, known_speed, capsys):
    assert bench_input.main([recipe]) == 1
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not known_speed


DEIT = {"rand_augment": "rand-m9-mstd0.5-inc1", "repeats": 3}


def test_absent_photographs_are_said(monkeypatch):
    pytest.importorskip("tensorflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.MissingDataError, match="pip install scikit-image scikit-learn"):
        bench_input.photographs()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in bench_input.PHOTOGRAPHS), reason="no photographs"
)
def test_measure():
    speed = bench_input.time_input(DEIT, size=64, batch=16, steps=2, rounds=1)
    assert speed["decode_images_per_s"] > 0 and 0 < speed["ratio"] < 2
    assert speed["ratio"] == pytest.approx(speed["input_images_per_s"] / speed["decode_images_per_s"])
    assert 30 < speed["kilobytes"] < 200
