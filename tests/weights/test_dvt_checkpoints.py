"""Weights of an official DVT checkpoint, which holds thresholds and curves beside them."""

from __future__ import annotations

import numpy as np
import pytest

import dyntoken
from dyntoken import weights
from dyntoken.analysis import timing
from dyntoken.weights import files

SIZES = {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}
LIMITS = [[0.9, 0.8, -1e8], [1e8, 0.7, -1e8]]
RESULTS = {
    "flops": [0.5, 1.5, 3.5],
    "anytime_classification": [69.0, 75.5, 80.0],
    "dynamic_threshold": np.array(LIMITS, np.float32),
    "budgeted_batch_classification": [[0.75, 1.25], [73.5, 78.0]],
}
DVT = ("blackfeather-wang/Dynamic-Vision-Transformer", "DVT_Deit_small_model", SIZES)


@pytest.fixture(scope="module")
def state():
    """State dict of a small DVT in the official keys, with its variables."""
    model = dyntoken.create_model("dvt_deit_small", width=16, depth=1, heads=2, num_classes=5)
    variables = timing.random_variables(model)
    return weights.export_reference(model, variables), variables


def assert_same(variables, expected):
    flat, wanted = weights.flat_variables(variables), weights.flat_variables(expected)
    assert flat.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(flat[path], value)


def flat(state, separator):
    results = {key: np.asarray(value) for key, value in RESULTS.items()}
    return {**{f"model_state_dict{separator}{key}": value for key, value in state.items()}, **results}


def test_a_checkpoint_as_a_mapping(state):
    source = {"model_state_dict": state[0], **RESULTS}
    model, variables = weights.import_reference(*DVT, source)
    assert model.exits == (7, 10, 14)
    assert_same(variables, state[1])
    assert_same(weights.load_weights(model, source, strict=True), state[1])


@pytest.mark.parametrize(("suffix", "separator"), [(".npz", "."), (".safetensors", "/")])
def test_a_converted_checkpoint(state, tmp_path, suffix, separator):
    path = tmp_path / f"dvt{suffix}"
    tensors = flat(state[0], separator)
    files.write_npz(path, tensors) if suffix == ".npz" else files.write_safetensors(path, tensors, {})
    bundle = files.read(path)
    assert bundle.tensors.keys() == state[0].keys() and not bundle.own


def test_results_beside_a_bare_state_dict_are_no_weights(state):
    source = {**state[0], **{key: np.asarray(value) for key, value in RESULTS.items()}}
    assert files.read(source).tensors.keys() == state[0].keys()
    assert_same(weights.import_reference(*DVT, source)[1], state[1])


def test_a_torch_checkpoint(state, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {f"module.{key}": torch.tensor(value) for key, value in state[0].items()}
    results = {**RESULTS, "dynamic_threshold": torch.tensor(LIMITS)}
    path = tmp_path / "dvt.pth.tar"
    torch.save({"model_state_dict": tensors, **results}, path)
    assert files.read(path).tensors.keys() == state[0].keys()
