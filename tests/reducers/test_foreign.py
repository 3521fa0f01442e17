"""The tutorial's reducer in a foreign ViT, taken from there and run."""

import pathlib
import re

import jax
import numpy as np

TUTORIAL = pathlib.Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"


def test_the_tutorials_example_runs():
    code = re.search(
        r"tests/reducers/test_foreign.py -->\n```python\n(.*?)```", TUTORIAL.read_text(), re.S
    ).group(1)
    assert len(code.partition("class ")[2].splitlines()) <= 20
    scope = {}
    exec(code, scope)
    model, images = scope["MyViT"](), jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    logits, reduction = jax.jit(model.apply)(variables, images)
    assert logits.shape == (2, 10) and np.isfinite(logits).all()
    assert reduction.keep.shape == (2, 32) and reduction.carrier.shape == (2, 64)
    assert set(np.unique(reduction.carrier)) <= set(range(32))  # every patch has a host
    assert "predictor" in variables["params"]["reducer"]
