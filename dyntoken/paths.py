"""Where things lie: a local path, or a URI such as `gs://bucket/run`."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from typing import Any

from etils import epath

ANSWERS_WITHIN_S = 30.0
REMEDY = "check the name, the network and your credentials, or give a local path"


class PathError(ValueError):
    """A place that cannot be used; one line that says why and what to do."""


class StorageError(OSError):
    """What lies there cannot be read or written now; one line that says why and what to do."""


def is_uri(path: Any) -> bool:
    """Whether a path is one of a storage service, not of this machine."""
    return "://" in os.fspath(path)


def resolve(path: Any) -> epath.Path:
    """A path as it is used from here on: a URI unchanged, a local one absolute, `~` replaced.

    Never `epath.Path.absolute()` on a URI: `gs://b/run` becomes `$PWD/gs:/b/run`, a local folder.

    Raises:
      PathError: a kind of URI that nothing here reads, or a storage service that does not answer.
    """
    text = os.fspath(path)
    scheme, uri, _ = text.partition("://")
    if not uri:
        found = epath.Path(text).expanduser()
        if is_uri(found):  # epath keeps buckets as /gs/..., /s3/... and takes such folders for them
            raise PathError(f"{text}: the folder would be taken for the bucket {found}; mount it elsewhere")
        return found.absolute()
    try:
        found = epath.Path(text)
    except KeyError:
        hint = "download it and give its path" if scheme.startswith("http") else "copy it to a local path"
        raise PathError(f"{text}: {scheme}:// is not read; {hint}, or use gs://") from None
    _check_answers(text)
    return found


def join(folder: Any, path: Any) -> str:
    """A path; a relative one is of a folder."""
    text = os.path.expanduser(os.fspath(path))
    return text if is_uri(text) or os.path.isabs(text) else f"{os.fspath(folder).rstrip('/')}/{text}"


def walk(folder: epath.Path) -> Iterator[epath.Path]:
    """All files of a folder and of those in it."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from walk(entry)
        else:
            yield entry


def move(source: epath.Path, target: epath.Path) -> None:
    """Moves a file or a folder to a place that is free; of a URI the copy is complete before the original goes."""
    if not is_uri(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
    elif source.is_dir():
        # Not `rename`: fsspec's refuses a target whose "folder" holds no object yet.
        for file in walk(source):
            file.copy(target / file.relative_to(source))
        source.rmtree(missing_ok=True)
    else:
        source.copy(target)
        source.unlink(missing_ok=True)


def atomic_write(path: epath.Path, text: str) -> None:
    """Replaces a file as a whole: a reader sees the old text or the new one."""
    if is_uri(path):  # as every write to a storage service
        path.write_text(text)
        return
    draft = path.parent / (path.name + ".new")
    draft.write_text(text)
    draft.replace(path)


@functools.lru_cache(maxsize=32)
def _check_answers(uri: str) -> None:
    """Asks once: libraries retry for minutes what has no network or no permission."""
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            epath.Path(uri).exists()
        except BaseException as error:
            failures.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWERS_WITHIN_S)
    if asking.is_alive():
        raise PathError(f"{uri} does not answer within {ANSWERS_WITHIN_S:.0f} s: {REMEDY}")
    if failures:
        reason = " ".join(str(failures[0]).split())[:300] or type(failures[0]).__name__
        raise PathError(f"{uri} cannot be reached ({reason}): {REMEDY}") from failures[0]
