"""Thresholds and curves in an official DVT checkpoint, and its weights beside them."""

from __future__ import annotations

import numpy as np
import pytest

import dyntoken
from dyntoken import weights
from dyntoken.analysis import timing
from dyntoken.weights import WeightsError, files

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


def assert_results(found):
    np.testing.assert_array_equal(found.gmacs, [0.5, 1.5, 3.5])
    np.testing.assert_allclose(found.anytime, [0.69, 0.755, 0.8], rtol=1e-12)
    np.testing.assert_array_equal(found.thresholds, np.float32(LIMITS))
    assert found.thresholds.dtype == np.float32
    np.testing.assert_array_equal(found.cost, [0.75, 1.25])
    np.testing.assert_allclose(found.accuracy, [0.735, 0.78], rtol=1e-12)


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
    assert_results(weights.stored_exits(source))
    model, variables = weights.import_reference(*DVT, source)
    assert model.exits == (7, 10, 14)
    assert_same(variables, state[1])
    assert_same(weights.load_weights(model, source, strict=True), state[1])


@pytest.mark.parametrize(("suffix", "separator"), [(".npz", "."), (".safetensors", "/")])
def test_a_converted_checkpoint(state, tmp_path, suffix, separator):
    path = tmp_path / f"dvt{suffix}"
    tensors = flat(state[0], separator)
    files.write_npz(path, tensors) if suffix == ".npz" else files.write_safetensors(path, tensors, {})
    assert_results(weights.stored_exits(path))
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
    assert_results(weights.stored_exits(path))
    assert files.read(path).tensors.keys() == state[0].keys()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"flops": [0.5, 1.5]}, r"anytime_classification has shape \[3\], 2 exits and 2 points need \[2\]"),
        ({"dynamic_threshold": [0.9, 0.8, 0.7]}, r"dynamic_threshold has shape \[3\].* need \[0, 3\]"),
        ({"dynamic_threshold": [[0.9, 0.8], [0.1, 0.2]]}, r"has shape \[2, 2\].* need \[2, 3\]"),
        ({"budgeted_batch_classification": [[1.0], [70.0]]}, r"has shape \[2, 1\].* need \[2, 2\]"),
        ({"anytime_classification": [1.0, np.nan, 2.0]}, "anytime_classification holds NaN"),
        ({"flops": [[1.0], [2.0, 3.0]]}, "flops holds no regular table"),
        ({"flops": ["a", "b", "c"]}, "flops holds no regular table"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(changed, message):
    with pytest.raises(WeightsError, match=message) as error:
        weights.stored_exits({**RESULTS, **changed})
    assert "\n" not in str(error.value)


def test_missing_keys_are_named(tmp_path):
    with pytest.raises(WeightsError, match="of DVT: lacks dynamic_threshold, budgeted_batch_classification"):
        weights.stored_exits({key: RESULTS[key] for key in ("flops", "anytime_classification")})
    with pytest.raises(WeightsError, match="no such weight file"):
        weights.stored_exits(tmp_path / "absent.npz")
