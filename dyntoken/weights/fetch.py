"""Weight sources that are no local file: the hub, https; and which file of a folder holds the weights."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import pathlib
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from etils import epath

from dyntoken.weights.errors import WeightsError, first_line

# Files of a checkpoint folder that hold its weights, best first: as `save_pretrained` writes them, and timm.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TIMEOUT = 30.0  # seconds without a byte
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def in_folder(folder: Any) -> Any:
    """The weight file of a folder as `save_pretrained` writes it, None without one."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)


def hub(source: str, beside: Sequence[str] = ()) -> str:
    """Local path of `"hf:org/name[@revision][/file]"`, downloaded by huggingface_hub.

    Without a file name, the first of `WEIGHT_FILES` that there is; of an index, its shards as well.

    Args:
      source: the name.
      beside: further files to fetch into the same folder, as far as the repository has them.

    Raises:
      WeightsError: huggingface_hub is not installed, or what it could not download.
    """
    parts = source.removeprefix("hf:").split("/")
    if len(parts) < 2 or not all(parts):
        raise WeightsError(f"{source}: write hf:org/name or hf:org/name/file")
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise WeightsError(
            f"{source}: needs huggingface_hub; `pip install huggingface_hub`, "
            "or download the file and give its path"
        ) from error
    name, _, revision = parts[1].partition("@")

    away: list[str] = []  # without a network nobody knows whether the repository has them

    def fetch(file: str) -> str | None:
        try:
            return huggingface_hub.hf_hub_download(
                repo_id=f"{parts[0]}/{name}", filename=file, revision=revision or None
            )
        except LocalEntryNotFoundError:
            away.append(file)
            return None
        except EntryNotFoundError:
            return None
        except Exception as error:  # missing repository or permission, broken connection
            raise WeightsError(f"{source}: could not be downloaded ({first_line(error)})") from error

    wanted = ["/".join(parts[2:])] if parts[2:] else list(WEIGHT_FILES)
    path = next((found for file in wanted if (found := fetch(file))), None)
    folder = "".join(f"{part}/" for part in parts[2:-1])
    if path is not None and path.endswith(".index.json"):
        away.clear()
        for shard in sorted(set(index(path).values())):
            fetch(folder + shard)
    if away and (path is None or path.endswith(".index.json")):
        raise WeightsError(
            f"{source}: {away[0]} is not in the local cache and the hub cannot be reached; "
            "go online, or download the file elsewhere and give its path"
        )
    if path is None:
        raise WeightsError(f"{source}: the repository has no {' or '.join(wanted)}; name one of its files")
    for file in beside:
        fetch(folder + file)
    return path


def index(path: Any) -> dict[str, str]:
    """Key -> file of a sharded checkpoint's index.

    Raises:
      WeightsError: no such index.
    """
    try:
        found = json.loads(epath.Path(path).read_text())["weight_map"]
        names = {str(key): str(file) for key, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path}: no index of a sharded checkpoint (a JSON object with 'weight_map'); "
            "give the folder, the index or a weight file"
        ) from error
    if wrong := next((file for file in names.values() if re.search(r"[/\\]|^\.", file)), None):
        raise WeightsError(f"{path}: names the shard {wrong!r}, which is not a file beside it")
    return names


def https(source: str, sha256: str | None = None) -> str:
    """Local path of `"https://...#sha256=..."`, downloaded once; what has another checksum is never kept.

    Args:
      source: the address; plain http only of this machine.
      sha256: of the file, in place of the address's own.

    Raises:
      WeightsError: no checksum, another one, or a download that failed.
    """
    url, _, fragment = source.partition("#")
    wanted = (sha256 or fragment.removeprefix("sha256=")).lower()
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise WeightsError(
            f"{url}: without a checksum https:// is not read; give the file's, sha256='...' or #sha256=... behind the "
            "address (64 hexadecimal digits, `sha256sum FILE` prints them), or of a bucket gs://"
        )
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in LOOPBACK:
        raise WeightsError(f"{source}: give an https:// address")
    folder = cache()
    name = re.sub(r"[^\w.-]", "_", pathlib.PurePosixPath(parts.path).name) or "weights"
    target = folder / f"{wanted[:16]}-{name}"
    if target.exists() and _digest(target) == wanted:
        return str(target)
    folder.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            while block := answer.read(1 << 20):
                file.write(block)
        if (found := _digest(pathlib.Path(partial))) != wanted:
            raise WeightsError(
                f"{url}: has the checksum sha256={found}, not {wanted}: another file than was meant, or damaged"
            )
        os.replace(partial, target)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise WeightsError(f"{url}: could not be downloaded ({first_line(error)})") from error
    finally:
        pathlib.Path(partial).unlink(missing_ok=True)
    return str(target)


def cache() -> pathlib.Path:
    """Where downloads by https are kept: $DYNTOKEN_CACHE, else dyntoken/ in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(os.environ.get("DYNTOKEN_CACHE") or os.path.join(home, "dyntoken"))


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
