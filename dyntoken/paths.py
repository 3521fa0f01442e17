"""Where things lie: a local path, or a URI such as `gs://bucket/run`."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

from etils import epath

ANSWERS_WITHIN_S = 30.0
REMEDY = "check the name, the network and your credentials, or give a local path"


class PathError(ValueError):
    """A place that cannot be used; one line that says why and what to do."""


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
