"""Torch checkpoints as nested dicts of numpy arrays, without running anything they hold.

torch reads them with `weights_only=True`. Objects that trainers leave beside the
weights (arguments, paths, dates, numpy values) would make it refuse the whole
file; here each known one is read by a stand-in of its name, so that neither its
own class nor numpy's unpickling ever sees bytes of the file.
"""

from __future__ import annotations

import collections
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from dyntoken.weights.errors import WeightsError, damaged

ZIP = b"PK\x03\x04"
# Parts of an archive that is a program: TorchScript, torch.export, torch.package.
PROGRAMS = re.compile(
    r"(^|/)(constants\.pkl|code/.*|models/model\.json|serialized_exported_program\.json|\.data/extern_modules)$"
)
SAVE = (
    "save the state dict alone where the file was made, torch.save(model.state_dict(), PATH), and give that"
)
DTYPES = re.compile(r"[?bBhHiIlLqQefd]|b1|[iu][1248]|f[248]|[US]\d*")


class Unreadable:
    """A tensor that numpy has no counterpart of; an error only where it is a weight."""

    def __init__(self, what: str):
        self.what = what


class _Beside:
    """Stands in for an object that is no weight: takes any arguments and state, keeps none."""

    def __init__(self, *given: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _BesideDict:
    """Stands in for subclasses of dict; torch fills plain dicts and ordered ones only."""

    def __new__(cls, *given: Any) -> Any:
        return collections.OrderedDict()


def _beside_list(*given: Any) -> list[Any]:
    return []


class _DType:
    """Stands in for `numpy.dtype`; `value` is None for what holds more than numbers or text."""

    def __init__(self, code: Any = "", *flags: Any):
        code = code.decode("ascii", "replace") if isinstance(code, bytes) else str(code)
        self.value = np.dtype(code) if DTYPES.fullmatch(code) else None

    def __setstate__(self, state: Any) -> None:
        if self.value is not None and state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """Stands in for `numpy.ndarray`; `value` is None for arrays of objects."""

    value: np.ndarray | None = None

    def __init__(self, *given: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if isinstance(dtype, _DType) and dtype.value is not None and isinstance(data, bytes):
            order = "F" if fortran else "C"
            self.value = np.frombuffer(data, dtype.value).reshape(shape, order=order)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    value = dtype.value if isinstance(dtype, _DType) else None
    return None if value is None else np.frombuffer(data, value, 1)[0].item()


_NUMPY = {"scalar": _scalar, "_reconstruct": _Array}
# Exact names -> what is called in their place. Files written under numpy 1 say `numpy.core`.
STAND_INS: dict[str, Any] = {
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
    **{f"numpy.{core}.multiarray.{name}": f for core in ("core", "_core") for name, f in _NUMPY.items()},
    "argparse.Namespace": _Beside,
    "types.SimpleNamespace": _Beside,
    **{
        f"pathlib.{module}{pure}{system}Path": _Beside
        for module in ("", "_local.")
        for pure in ("", "Pure")
        for system in ("", "Posix", "Windows")
    },
    **{f"datetime.{name}": _Beside for name in ("datetime", "date", "time", "timedelta", "timezone")},
    "decimal.Decimal": _Beside,
    "fractions.Fraction": _Beside,
    "uuid.UUID": _Beside,
    # The default of a defaultdict, or a type in a configuration: only named, never called.
    **{f"builtins.{name}": _Beside for name in ("bool", "dict", "float", "int", "list", "str", "tuple")},
    **{f"builtins.{name}": _Beside for name in ("frozenset", "range", "slice")},
    "collections.deque": _beside_list,
    "collections.defaultdict": _BesideDict,
    "easydict.EasyDict": _BesideDict,
    "yacs.config.CfgNode": _BesideDict,
    "pytorch_lightning.utilities.parsing.AttributeDict": _BesideDict,
    "lightning_fabric.utilities.data.AttributeDict": _BesideDict,
    "lightning.fabric.utilities.data.AttributeDict": _BesideDict,
}


def read_torch(path: epath.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The nested dict of a torch checkpoint, tensors as numpy arrays; numbers, strings and lists as they are.

    Raises:
      WeightsError: torch is not installed; the file is damaged (zip archives, torch's
        form since 1.6, carry a checksum per tensor, which torch does not check); or it
        holds code, which is never run.
    """
    data = path.read_bytes()
    if not data.startswith((ZIP, b"\x80")):  # a zip archive, or the pickle of torch before 1.6
        what = f"starts with {data[:8]!r}" if data else "is empty"
        raise damaged(path, "torch", f"no torch file: it {what}")
    if data.startswith(ZIP):
        _check_archive(path, data)
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path}: reading a torch checkpoint needs torch: `pip install torch`, "
            "or convert the file to .safetensors where torch is installed"
        ) from error
    pairs = [(value, name) for name, value in STAND_INS.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(pairs):
            warnings.simplefilter("ignore")  # of torch, about its own storages
            tree = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged or unsafe file
        raise _refused(path, error) from error
    return _converted(tree), {}


def _check_archive(path: epath.Path, data: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(PROGRAMS.search(name) for name in archive.namelist()):
                raise WeightsError(
                    f"{path}: holds code (TorchScript or an exported program), never run; {SAVE}"
                )
            # torch.serialization.set_crc32_options(False) writes 0 for every part.
            checked = any(info.CRC for info in archive.infolist())
            broken = archive.testzip() if checked else None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise damaged(path, "torch", error) from error
    if broken:
        raise damaged(path, "torch", f"{broken} has another checksum than when it was written")


def _refused(path: epath.Path, error: Exception) -> WeightsError:
    text = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
    found = re.search(r"GLOBAL (\S+)", text)
    if found:
        return WeightsError(
            f"{path}: holds code or an object of {found[1]}, which is never unpickled, as that can run code; {SAVE}"
        )
    if isinstance(error, pickle.UnpicklingError) and re.search("Unsupported operand|pickle protocol", text):
        return WeightsError(
            f"{path}: pickled by something else than torch.save in its usual form ({text[:60]}), "
            f"or damaged; {SAVE}, or download it again"
        )
    return damaged(path, "torch", text)


def _converted(node: Any) -> Any:
    import torch

    if isinstance(node, torch.Tensor):
        return _array(node.detach())
    if isinstance(node, Mapping):
        return {str(key): _converted(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_converted(value) for value in node]
    if isinstance(node, _Array):
        return node.value
    return node if isinstance(node, (int, float, str)) else None


def _array(tensor: Any) -> np.ndarray | Unreadable:
    import torch

    for what, holds in (
        ("a nested tensor", tensor.is_nested),
        ("sparse", tensor.layout != torch.strided),
        ("quantised", tensor.is_quantized),
        ("a meta tensor, whose values were never saved", tensor.is_meta),
        ("complex", tensor.is_complex()),
    ):
        if holds:
            return Unreadable(what)
    try:
        narrow = tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float64)
        return (tensor.float() if narrow else tensor).numpy()  # bfloat16 and float8: numpy has none
    except (TypeError, RuntimeError, NotImplementedError):
        return Unreadable(f"of type {tensor.dtype}")
