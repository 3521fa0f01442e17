"""Reading and writing weight files, and refusing damaged or unsafe ones."""

from __future__ import annotations

import builtins
import importlib.util
import pickle
import zlib

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dyntoken.weights import files
from dyntoken.weights.files import WeightsError

TENSORS = {"norm.weight": np.arange(3, dtype=np.float32), "head.bias": np.ones((2,), np.float32)}


class _Trap:
    """Unpickling this runs code."""

    fired = False

    def __reduce__(self):
        return (_fire, ())


def _fire():
    _Trap.fired = True


@pytest.fixture
def without(monkeypatch):
    """Makes an import fail as if the package were not installed."""

    def hide(package):
        real = builtins.__import__

        def fake(name, *args, **kwargs):
            if name.split(".")[0] == package:
                raise ImportError(f"No module named {package!r}")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fake)

    return hide


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_round_trip_of_a_file(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    if suffix == ".npz":
        files.write_npz(path, TENSORS)
    else:
        files.write_safetensors(path, TENSORS, {"format": "test"})
    bundle = files.read(path)
    assert set(bundle.tensors) == set(TENSORS)
    np.testing.assert_array_equal(bundle.tensors["norm.weight"], [0, 1, 2])
    assert not bundle.own
    assert bundle.metadata == ({} if suffix == ".npz" else {"format": "test"})
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_half_precision_is_widened(tmp_path):
    files.write_safetensors(tmp_path / "w.safetensors", {"x": np.array([1.5], np.float16)}, {})
    files.write_safetensors(tmp_path / "b.safetensors", {"x": np.asarray(jnp.array([1.5], jnp.bfloat16))}, {})
    for name in ("w", "b"):
        value = files.read(tmp_path / f"{name}.safetensors").tensors["x"]
        assert value.dtype == np.float32
        assert value == [1.5]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_truncated_file_is_one_clear_error(tmp_path, suffix, share):
    path = tmp_path / f"w{suffix}"
    (files.write_npz(path, TENSORS) if suffix == ".npz" else files.write_safetensors(path, TENSORS, {}))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(
        WeightsError, match=f"w{suffix}: truncated or damaged .* copy or download it again"
    ) as error:
        files.read(path)
    assert "\n" not in str(error.value)


def test_pickles_in_an_npz_are_refused(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, x=np.array([_Trap()], dtype=object))
    with pytest.raises(WeightsError, match="pickled objects"):
        files.read(path)
    assert not _Trap.fired


def test_a_bare_pickle_named_npz_is_refused(tmp_path):
    path = tmp_path / "w.npz"
    path.write_bytes(pickle.dumps({"x": _Trap()}))
    with pytest.raises(WeightsError):
        files.read(path)
    assert not _Trap.fired


def test_torch_file_without_torch_says_what_to_install(tmp_path, without):
    path = tmp_path / "deit.pth"
    path.write_bytes(pickle.dumps({"x": _Trap()}))
    without("torch")
    with pytest.raises(WeightsError, match=r"pip install torch"):
        files.read(path)
    assert not _Trap.fired


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_file_is_read_without_unpickling(tmp_path):
    import torch

    path = tmp_path / "deit.pth"
    torch.save({"model": {"norm.weight": torch.arange(3.0)}, "epoch": 3}, path)
    np.testing.assert_array_equal(files.read(path).tensors["norm.weight"], [0, 1, 2])
    path.write_bytes(pickle.dumps({"x": _Trap()}))
    with pytest.raises(WeightsError):
        files.read(path)
    assert not _Trap.fired


def test_hub_source_without_its_package_says_what_to_install(without):
    without("huggingface_hub")
    with pytest.raises(WeightsError, match=r"pip install huggingface_hub"):
        files.read("hf:timm/deit_tiny_patch16_224.fb_in1k")


def test_hub_source_must_name_organisation_and_model():
    with pytest.raises(WeightsError, match="write hf:org/name"):
        files.read("hf:deit")


def test_a_name_that_is_nearly_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dinov2_small").mkdir()
    for given, near in (("dinov2_smal", "dinov2_small"), ("./dinov2-small", "./dinov2_small")):
        with pytest.raises(WeightsError, match=rf"no such weight file or directory: did you mean {near}\?$"):
            files.read(given)
    with pytest.raises(WeightsError, match=r"absent/w.npz: .*: give a file, a folder, hf:ORG/NAME"):
        files.read("absent/w.npz")


def test_missing_and_unknown_files():
    with pytest.raises(WeightsError, match="no such weight file"):
        files.read("absent.safetensors")
    with pytest.raises(WeightsError, match=r"unknown weight format '.py'"):
        files.read(__file__)


@pytest.mark.parametrize("wrapper", ["model", "net", "state_dict", "params"])
def test_wrapped_state_dicts(wrapper):
    bundle = files.read({wrapper: TENSORS, "epoch": 3})
    assert set(bundle.tensors) == set(TENSORS)


def test_average_or_raw_parameters():
    raw, average = {"x": np.zeros(1, np.float32)}, {"x": np.ones(1, np.float32)}
    for source in ({"model": raw, "model_ema": average}, {"params": raw, "ema": {"params": average}}):
        assert files.read(source).tensors["x"] == 1
        assert files.read(source, "params").tensors["x"] == 0
    with pytest.raises(WeightsError, match="choose 'ema' or 'params'"):
        files.read({"x": raw["x"]}, "best")


def test_statistics_follow_their_parameters():
    average = {"params": {"a": np.ones(1)}, "batch_stats": {"bn": {"mean": np.full(1, 2.0)}}}
    source = {"params": {"a": np.zeros(1)}, "batch_stats": {"bn": {"mean": np.zeros(1)}}, "ema": average}
    assert files.read(source).tensors["batch_stats/bn/mean"] == 2
    assert files.read(source, "params").tensors["batch_stats/bn/mean"] == 0


def test_nest_is_the_inverse_of_flatten():
    tree = {"a": {"b": np.zeros(1), "c": np.ones(2)}, "d": np.zeros(3)}
    flat = files.flatten(tree)
    assert sorted(flat) == ["a/b", "a/c", "d"]
    assert files.nest(flat)["a"]["c"].shape == (2,)


def _save(workdir, step, value, checksums=None):
    state = {"params": {"a": np.full(2, value, np.float32)}, "step": np.int32(step)}
    state["ema"] = {"params": {"a": np.full(2, value + 0.5, np.float32)}}
    arrays = {
        "params/a": state["params"]["a"],
        "ema/params/a": state["ema"]["params"]["a"],
        "step": state["step"],
    }
    right = {name: zlib.crc32(array.tobytes()) for name, array in arrays.items()}
    leaves = {name: [[2], "float32", value] for name, value in (right | (checksums or {})).items()}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave({"step": step, "leaves": leaves})
    )
    with ocp.CheckpointManager(workdir.absolute() / "checkpoints") as manager:
        manager.save(step, args=items)
        manager.wait_until_finished()


def test_newest_step_of_a_workdir(tmp_path):
    _save(tmp_path, 2, 2.0)
    _save(tmp_path, 10, 10.0)
    np.testing.assert_array_equal(files.read(tmp_path).tensors["a"], [10.5, 10.5])
    np.testing.assert_array_equal(files.read(tmp_path, "params").tensors["a"], [10, 10])
    np.testing.assert_array_equal(files.read(tmp_path / "checkpoints" / "2", "params").tensors["a"], [2, 2])
    np.testing.assert_array_equal(files.read(tmp_path / "checkpoints", "params", 2).tensors["a"], [2, 2])
    with pytest.raises(WeightsError, match=r"step='best' chooses among the checkpoints of a workdir"):
        files.read({"a": np.zeros(2)}, step="best")


def test_workdir_without_checkpoint(tmp_path):
    with pytest.raises(WeightsError, match="no finished checkpoint"):
        files.read(tmp_path)


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    """Orbax restores it without a word; the checksums beside the state tell."""
    _save(tmp_path, 1, 1.0, {"params/a": zlib.crc32(np.full(2, 1.0, np.float32).tobytes())})
    assert files.read(tmp_path, "params").tensors["a"].tolist() == [1, 1]
    _save(tmp_path, 2, 2.0, {"params/a": zlib.crc32(np.full(2, 2.5, np.float32).tobytes())})
    with pytest.raises(WeightsError, match=r"2: damaged checkpoint .params/a has another checksum"):
        files.read(tmp_path)
