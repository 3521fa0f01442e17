"""Long work in parts on disk: killed at any moment, it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Columns = dict[str, np.ndarray]


class Parts:
    """The parts of a file that is being made, each a `.npz` in a folder beside it.

    A part is there as a whole or not at all. The folder says what it is part of, so that
    other pictures or options do not mix with it; it is removed when the file is written.
    """

    def __init__(self, out: Path, plan: dict[str, Any]):
        """Opens the folder of `out`, or makes it.

        Args:
          plan: all that the result depends on, as JSON takes it.

        Raises:
          ValueError: the folder holds parts of something else.
        """
        self.out, self.folder = out, out.with_name(f"{out.name}.parts")
        self.folder.mkdir(parents=True, exist_ok=True)
        text = hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()
        told = self.folder / "plan"
        if told.exists():
            if told.read_text() != text:
                raise ValueError(
                    f"{self.folder} holds a part of other pictures, weights or options: give them again to "
                    "finish it, remove the folder to start anew, or name another --out"
                )
        else:
            _replace(told, lambda path: path.write_text(text))

    def columns(self, number: int, make: Callable[[], Columns]) -> Columns:
        """A part: read if it is there, else made and written."""
        path = self.folder / f"{number:06d}.npz"
        if not path.exists():
            made = make()
            _replace(path, lambda temporary: write_npz(temporary, lambda: [made]))
            return made
        with np.load(path) as stored:
            return dict(stored)

    def finish(self, write: Callable[[Path], Any]) -> None:
        """Writes the file itself, and removes the parts."""
        _replace(self.out, write)
        shutil.rmtree(self.folder)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Has a file written under another name, then gives it its own: it is never there in part."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_npz(path: Path, parts: Callable[[], Iterable[Columns]]) -> None:
    """One `.npz` of columns that come in parts, with one part in memory at a time.

    Args:
      parts: called anew for each column.
    """
    sizes = [{name: (len(column), column.dtype) for name, column in part.items()} for part in parts()]
    with zipfile.ZipFile(path, "w") as archive:
        for name in sizes[0]:
            dtype = max(
                (size[name][1] for size in sizes), key=lambda dtype: dtype.itemsize
            )  # of texts the longest
            count = sum(size[name][0] for size in sizes)
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                for number, part in enumerate(parts()):
                    column = part[name].astype(dtype)
                    if not number:
                        shape = (count, *column.shape[1:])
                        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_2_0(file, header)
                    file.write(column.tobytes())


def write_parquet(path: Path, parts: Callable[[], Iterable[Columns]]) -> None:
    """One Parquet file, a row group per part; a column `[N, C]` is a list of fixed length, `[N, n, C]` a tensor.

    Raises:
      ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ImportError("Parquet needs pyarrow: pip install pyarrow, or give --out=FILE.npz") from None

    def array(column: np.ndarray) -> Any:
        if column.ndim < 2:
            return pa.array(column)
        values, size = pa.array(column.reshape(-1)), int(np.prod(column.shape[1:]))
        listed = pa.FixedSizeListArray.from_arrays(values, size)
        if column.ndim == 2:
            return listed
        tensor = pa.fixed_shape_tensor(values.type, column.shape[1:])
        return pa.ExtensionArray.from_storage(tensor, listed)

    tables = (pa.table({name: array(column) for name, column in part.items()}) for part in parts())
    first = next(tables)
    with parquet.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def run(jobs: Sequence[Any], make: Callable[[Any], Columns], parts: Parts | None) -> Iterator[Columns]:
    """The columns of each job, from disk where an earlier run has made them."""
    for number, job in enumerate(jobs):
        yield make(job) if parts is None else parts.columns(number, lambda job=job: make(job))
