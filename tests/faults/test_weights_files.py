"""Weight files as people have them: whole ones are read, damaged and unsafe ones are refused for what they are."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pathlib
import random
import re
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from dyntoken.weights import files
from dyntoken.weights.files import WeightsError

torch = pytest.importorskip("torch")
WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


class Config:
    """A class of the trainer that wrote the file."""


def written(path, tree, **options):
    torch.save(tree, path, **options)
    return path


def refusal(path):
    """The one line that a file is refused with."""
    with pytest.raises(WeightsError) as error:
        files.read(path)
    text = str(error.value)
    assert text.isprintable() and str(path) in text, text
    return text


BESIDE = {
    "numpy float": np.float64(0.5),
    "numpy integer": np.int64(3),
    "numpy bool": np.bool_(True),
    "numpy text": np.str_("a"),
    "numpy array": np.arange(3.0),
    "column-major array": np.asfortranarray(np.ones((2, 3))),
    "array of objects": np.array([None, 1], dtype=object),
    "dtype": np.dtype("float32"),
    "random state": np.random.RandomState(0).get_state(),
    "path": pathlib.Path("a/b"),
    "windows path": pathlib.PureWindowsPath("a/b"),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("ab"),
    "deque": collections.deque([1, 2]),
    "namespace": argparse.Namespace(lr=1.0, at=(3, 6), inner=argparse.Namespace(path=pathlib.Path("x"))),
    "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "slice": slice(1, 2),
    "type": int,
    "set": {1, 2},
    "sparse tensor": torch.ones(2, 2).to_sparse(),  # no weight: in an optimiser's state
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", BESIDE)
def test_objects_beside_the_weights_do_not_hide_them(tmp_path, name, legacy):
    tree = {"model": {"norm.weight": torch.tensor(WEIGHT)}, "extra": BESIDE[name], "epoch": 3}
    path = written(tmp_path / "deit.pth", tree, _use_new_zipfile_serialization=not legacy)
    np.testing.assert_array_equal(files.read(path).tensors["norm.weight"], WEIGHT)


@pytest.mark.parametrize("new", [b"numpy._core", b"numpy.core"], ids=["numpy2", "numpy1"])
def test_numpy_values_under_either_name(tmp_path, new):
    """`numpy.core` in files of numpy 1, `numpy._core` in those of numpy 2; the values come through."""
    tree = {
        "flops": np.float32(1.5),
        "curve": np.arange(4, dtype=">i2").reshape(2, 2, order="F"),
        "n": np.int64(7),
    }
    path = written(tmp_path / "a.pth", tree, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert b"numpy._core" in data or b"numpy.core" in data
    path.write_bytes(re.sub(rb"numpy\._?core", new, data))
    found, _, _ = files.read_tree(path)
    assert found["flops"] == 1.5 and found["n"] == 7
    np.testing.assert_array_equal(found["curve"], tree["curve"])


def test_weights_as_numpy_arrays_and_as_parameters(tmp_path):
    tree = {"a": WEIGHT.astype(np.float16), "b": torch.nn.Parameter(torch.tensor(WEIGHT)), "c": WEIGHT.T}
    found = files.read(written(tmp_path / "a.pth", {"state_dict": tree})).tensors
    for name, value in (("a", WEIGHT), ("b", WEIGHT), ("c", WEIGHT.T)):
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_narrow_floats_are_widened(tmp_path, kind, suffix):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        written(path, {"x": torch.tensor(WEIGHT).to(getattr(torch, kind))})
    else:
        pytest.importorskip("safetensors.torch").save_file(
            {"x": torch.tensor(WEIGHT).to(getattr(torch, kind))}, path
        )
    found = files.read(path).tensors["x"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, WEIGHT.astype(getattr(jnp, kind)).astype(np.float32))


@pytest.mark.parametrize(
    ("word", "make"),
    [
        ("sparse", lambda x: x.to_sparse()),
        ("sparse", lambda x: x.to_sparse_csr()),
        ("quantised", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
        ("meta", lambda x: x.to("meta")),
        ("complex", lambda x: x.to(torch.complex64)),
        ("nested", lambda x: torch.nested.nested_tensor([x])),
    ],
    ids=["coo", "csr", "quantised", "meta", "complex", "nested"],
)
@pytest.mark.filterwarnings("ignore")  # torch's, about its own prototypes
def test_weights_without_a_plain_form_are_named(tmp_path, word, make):
    text = refusal(written(tmp_path / "w.pth", {"model": {"norm.weight": make(torch.tensor(WEIGHT))}}))
    assert "norm.weight" in text and word in text and "damaged" not in text


def test_packed_safetensors_are_named(tmp_path):
    safe = pytest.importorskip("safetensors.torch")
    packed = torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    safe.save_file({"norm.weight": packed}, tmp_path / "w.safetensors")
    text = refusal(tmp_path / "w.safetensors")
    assert "norm.weight" in text and "F4" in text and "damaged" not in text


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_other_objects_are_named_and_never_unpickled(tmp_path, legacy):
    tree = {"model": {"x": torch.ones(1)}, "config": Config()}
    text = refusal(written(tmp_path / "w.pth", tree, _use_new_zipfile_serialization=not legacy))
    assert f"{__name__}.Config" in text and "never unpickled" in text and "state_dict()" in text
    assert "damaged" not in text
    text = refusal(
        written(tmp_path / "m.pth", torch.nn.Linear(2, 2), _use_new_zipfile_serialization=not legacy)
    )
    assert "torch.nn.modules.linear.Linear" in text and "damaged" not in text


class _Call:
    def __init__(self, function, *given):
        self.call = (function, given)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [print, eval, getattr, pathlib.Path.exists], ids=lambda f: f.__name__)
def test_code_is_never_run(tmp_path, capsys, function):
    text = refusal(
        written(tmp_path / "w.pth", {"model": {"x": torch.ones(1)}, "x": _Call(function, "1", "2")})
    )
    assert "code" in text and capsys.readouterr().out == ""


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # TorchScript's deprecation
def test_programs_are_called_that(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "e.pt")
    for name in ("script.pt", "e.pt"):
        text = refusal(tmp_path / name)
        assert "code" in text and "state_dict()" in text and "damaged" not in text


def test_single_flipped_bits_of_a_torch_archive_are_found(tmp_path):
    """torch loads most of them as other numbers, without a word."""
    path = written(tmp_path / "w.pth", {"model": {"x": torch.arange(1000.0)}})
    data, random_ = path.read_bytes(), random.Random(0)
    wrong = 0
    for _ in range(24):
        at = random_.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << random_.randrange(8)]) + data[at + 1 :])
        try:
            found = files.read(path).tensors
        except WeightsError as error:
            assert str(error).isprintable()
        else:
            wrong += not np.array_equal(found["x"], np.arange(1000.0))
    assert wrong == 0
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        offset = next(i.header_offset for i in archive.infolist() if i.filename.endswith("data/0"))
    at = offset + 1000
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert "damaged" in refusal(path) and "checksum" in refusal(path)


def test_archives_written_without_checksums_are_read(tmp_path):
    """`set_crc32_options(False)`: every checksum is 0, which says nothing."""
    torch.serialization.set_crc32_options(False)
    try:
        path = written(tmp_path / "w.pth", {"model": {"x": torch.ones(2)}})
    finally:
        torch.serialization.set_crc32_options(True)
    assert files.read(path).tensors["x"].tolist() == [1, 1]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_cut_torch_files_are_damaged(tmp_path, share, legacy):
    path = written(
        tmp_path / "w.pth", {"model": {"x": torch.randn(400)}}, _use_new_zipfile_serialization=not legacy
    )
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "damaged torch file" in refusal(path)


def test_another_pickle_protocol_is_said(tmp_path):
    text = refusal(written(tmp_path / "w.pth", {"x": torch.ones(2)}, pickle_protocol=4))
    assert "pickled" in text and "state_dict()" in text


def test_terminal_escapes_of_a_key_stay_out(tmp_path):
    key = "norm\x1b[31m\n.weight"
    assert "[31m" not in refusal(written(tmp_path / "w.pth", {"model": {key: torch.ones(2, 2).to_sparse()}}))


def test_an_npy_named_npz(tmp_path):
    path = tmp_path / "w.npz"
    path.write_bytes(_npy(WEIGHT))
    text = refusal(path)
    assert ".npy" in text and "savez" in text


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_a_huge_declared_shape_is_damaged(tmp_path, version):
    """Nothing of the declared size is ever asked for."""
    head = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 10)}
    write = {1: np.lib.format.write_array_header_1_0, 2: np.lib.format.write_array_header_2_0}[version[0]]
    write(head, about)
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("x.npy", head.getvalue() + b"1234")
    assert "damaged npz" in refusal(tmp_path / "w.npz")


def test_an_array_cut_short_inside_a_whole_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("x.npy", _npy(WEIGHT)[:-4])
    assert "damaged npz" in refusal(tmp_path / "w.npz")


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
