"""Weight files as flat dicts of numpy arrays: safetensors, npz, orbax, torch, the hub.

Nothing here unpickles: `.npz` is read with `allow_pickle=False`; `.pth`: see `torch_files`.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from dyntoken import paths
from dyntoken.weights import fetch
from dyntoken.weights.errors import NoWeightsError, WeightsError, damaged, printable
from dyntoken.weights.torch_files import Unreadable, read_torch

# Names under which the public repositories wrap a state dict: DeiT, DynamicViT and EViT "model" (and its
# average "model_ema"), TPS "net", DVT "model_state_dict"; our own checkpoints "params" and "ema".
DVT_STATE = "model_state_dict"
PARAMS_KEYS = ("params", "model", "net", "state_dict", "module", DVT_STATE)
EMA_KEYS = ("ema", "model_ema", "state_dict_ema", "net_ema")
DINO_KEYS = ("teacher", "student")
PREFERENCES = ("ema", "params")
# What DVT's checkpoints hold beside their weights: costs, accuracies and thresholds of its exits.
DVT_RESULTS = ("flops", "anytime_classification", "dynamic_threshold", "budgeted_batch_classification")
LONGEST_HEADER = 100_000_000  # bytes, by the format
PRETRAINED = epath.Path(__file__).resolve().parent / "pretrained"
SAFETENSORS_TYPES = {
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BF16": np.dtype(jnp.bfloat16),
    "BOOL": np.dtype(bool),
    # The float8 of torch, which the numpy interface of safetensors does not know.
    **{
        f"F8_{kind.upper()}": np.dtype(getattr(jnp, f"float8_{kind}{more}"))
        for kind, more in (("e4m3", "fn"), ("e5m2", ""), ("e8m0", "fnu"), ("e4m3fnuz", ""), ("e5m2fnuz", ""))
    },
}


@dataclasses.dataclass
class Bundle:
    """What a source held.

    Attributes:
      tensors: flat dict, key to array, in the file's own names and layouts.
      metadata: strings stored beside them (safetensors header), else empty.
      origin: the source, for messages.
      own: whether keys are paths of our tree ("backbone/trunk/blocks_0/...").
      notes: what the reader of a report should know.
      layout: the `foreign.Layout` whose names were translated to timm's; None of any other source.
    """

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]
    origin: str
    own: bool
    notes: tuple[str, ...] = ()
    layout: Any = None


def read(source: Any, prefer: str = "ema", step: int | str = "newest") -> Bundle:
    """Reads a weight source.

    Args:
      source: path of a `.safetensors`, `.npz`, `.pth`/`.pt`/`.bin`/`.tar` file, an orbax
        directory, a folder with `fetch.WEIGHT_FILES`, `"pretrained:NAME"` (ships with the
        package), `"hf:org/name[/file]"`, `"https://...#sha256=..."`, or a mapping (nested or
        flat) of arrays.
      prefer: "ema" takes the weight average where the source holds one;
        "params" takes the raw parameters.
      step: which checkpoint of an orbax workdir: "newest", "best" or a step.

    Raises:
      WeightsError: missing, truncated, unknown or unreadable source.
    """
    if prefer not in PREFERENCES:
        raise WeightsError(f"prefer={prefer!r}: choose 'ema' or 'params'")
    return _bundle(*read_tree(source, step), prefer)


def read_tree(source: Any, step: int | str = "newest") -> tuple[Any, dict[str, str], str]:
    """A source as it is: its tree, the strings stored beside it, and its name for messages.

    Arguments and errors as `read`. Leaves are arrays; of a torch file also plain numbers, strings and lists.
    """
    if step != "newest" and (isinstance(source, Mapping) or not _place(str(source)).is_dir()):
        raise WeightsError(f"step={step!r} chooses among the checkpoints of a workdir, not in a weight file")
    if isinstance(source, Mapping):
        return source, {}, "the given mapping"
    name = str(source)
    path = local(name)
    if not path.exists():
        near = difflib.get_close_matches(path.name, _names_in(path.parent), n=1, cutoff=0.88)
        remedy = "give a file, a folder, hf:ORG/NAME (the hub) or pretrained:NAME (ships with the package)"
        raise NoWeightsError(name, os.path.join(os.path.dirname(name), near[0]) if near else None, remedy)
    if path.is_dir():
        from dyntoken.weights import orbax

        return orbax.read(path, step), orbax.describe(path, step), name
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise WeightsError(
            f"{name}: unknown weight format {path.suffix!r}; known: {', '.join(READERS)}, orbax directory"
        )
    return (*reader(path), name)


def _names_in(folder: epath.Path) -> list[str]:
    """What lies in a folder, [] if that cannot be read."""
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def local(name: str, sha256: str | None = None, beside: Sequence[str] = ()) -> epath.Path:
    """Where a source lies on this machine, fetched if need be; of a folder with weight files the best of these.

    Args:
      name: see `read`.
      sha256: see `fetch.https`.
      beside: see `fetch.hub`.
    """
    if name.startswith("hf:") and not name.startswith("hf://"):
        return epath.Path(fetch.hub(name, beside))
    if re.match(r"https?://", name):
        return epath.Path(fetch.https(name, sha256))
    path = shipped(name) if name.startswith("pretrained:") else _place(name)
    return (fetch.in_folder(path) or path) if path.is_dir() else path


def _place(name: str) -> epath.Path:
    try:
        return paths.resolve(name)
    except paths.PathError as error:
        raise WeightsError(str(error)) from error


def shipped(name: str) -> epath.Path:
    """The file of `"pretrained:NAME"`.

    Raises:
      WeightsError: no such weights in the package; names those there are.
    """
    path = PRETRAINED / f"{name.removeprefix('pretrained:')}.safetensors"
    if not path.exists():
        raise WeightsError(
            f"{name}: the package ships {', '.join(sorted(f.stem for f in PRETRAINED.glob('*.safetensors')))}"
        )
    return path


def read_safetensors(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors and the metadata of a `.safetensors` file."""
    data = path.read_bytes()
    try:
        tensors = {name: _array(entry) for name, entry in safetensors.deserialize(data)}
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise damaged(path, "safetensors", error) from error
    # Arrays that share their memory are written once; the header names the others.
    tied = {name: tensors[kept] for name, kept in metadata.items() if name not in tensors and kept in tensors}
    return {**tensors, **tied}, metadata


def header(path: epath.Path) -> dict[str, str]:
    """The metadata of a `.safetensors` file without its tensors; {} of any other file, or a damaged one."""
    if path.suffix.lower() != ".safetensors":
        return {}
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(min(size, LONGEST_HEADER))).get("__metadata__") or {}
    except (OSError, ValueError, AttributeError):
        return {}


def read_sharded(path: epath.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """All tensors and the metadata of the files that an index names."""
    tensors: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    where = fetch.index(path)
    for name in sorted(set(where.values())):
        shard = path.with_name(name)
        if not shard.exists():
            raise WeightsError(
                f"{path}: its shard {name} is missing; copy or download all of {_listed(where)}"
            )
        reader = READERS.get(shard.suffix.lower(), read_sharded)
        if reader is read_sharded:
            raise WeightsError(f"{path}: its shard {name} is of no known format")
        found, more = reader(shard)
        tensors |= found
        metadata |= more
    if absent := [key for key in where if key not in tensors]:
        raise WeightsError(
            f"{path}: {len(absent)} arrays are not in the shards that should hold them ({absent[0]} in "
            f"{where[absent[0]]}, ...); copy or download the shards again"
        )
    return tensors, metadata


def _listed(where: Mapping[str, str]) -> str:
    names = sorted(set(where.values()))
    return ", ".join(names if len(names) < 4 else [*names[:2], "...", names[-1]])


def _array(entry: Mapping[str, Any]) -> np.ndarray | Unreadable:
    if entry["dtype"] not in SAFETENSORS_TYPES:
        return Unreadable(f"of type {entry['dtype']}")
    return np.frombuffer(entry["data"], SAFETENSORS_TYPES[entry["dtype"]]).reshape(entry["shape"])


def read_npz(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All arrays of an `.npz` file; object arrays (pickles) are refused."""
    data = path.read_bytes()
    if data.startswith(np.lib.format.MAGIC_PREFIX):
        raise WeightsError(f"{path}: one array (.npy), named .npz; write np.savez(PATH, **arrays)")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {
                info.filename.removesuffix(".npy"): _member(archive, info) for info in archive.infolist()
            }, {}
    except (
        ValueError,
        OSError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ) as error:
        if "allow_pickle" in str(error):
            raise WeightsError(
                f"{path}: holds pickled objects, which can run code and are never loaded; save plain arrays"
            ) from error
        raise damaged(path, "npz", error) from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array; a shape of more bytes than there are is refused before numpy makes room for it."""
    data = archive.read(info)
    head = io.BytesIO(data)
    read = {1: np.lib.format.read_array_header_1_0}.get(
        np.lib.format.read_magic(head)[0], np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(head)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > len(data) - head.tell():
        raise ValueError(f"{info.filename} claims shape {list(shape)} in {len(data)} bytes")
    array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    # numpy writes JAX's bfloat16 as two bytes without a meaning.
    return array.view(jnp.bfloat16) if array.dtype == np.dtype("V2") else array


READERS = {
    ".safetensors": read_safetensors,
    ".npz": read_npz,
    ".pth": read_torch,
    ".pt": read_torch,
    ".bin": read_torch,
    ".tar": read_torch,
    ".ckpt": read_torch,
    ".json": read_sharded,
}


def write_safetensors(path: Any, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a `.safetensors` file; a reader never sees half of it."""
    arrays = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    _write(path, safetensors.numpy.save(arrays, {key: str(value) for key, value in metadata.items()}))


def write_npz(path: Any, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a plain `.npz` file."""
    buffer = io.BytesIO()
    np.savez(buffer, **{key: np.asarray(value) for key, value in tensors.items()})
    _write(path, buffer.getvalue())


def _write(path: Any, data: bytes) -> None:
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def flatten(tree: Mapping[str, Any], prefix: str = "", separator: str = "/") -> dict[str, np.ndarray]:
    """Nested mappings to a flat dict; leaves that are no arrays are left out."""
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        name = f"{prefix}{separator}{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, name, separator))
        elif hasattr(value, "shape") and hasattr(value, "dtype"):
            flat[name] = np.asarray(value)
        elif isinstance(value, Unreadable):
            flat[name] = value
    return flat


def nest(flat: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(separator)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _bundle(tree: Mapping[str, Any], metadata: Mapping[str, str], origin: str, prefer: str) -> Bundle:
    """Unwraps, flattens and normalises the tree of a source."""
    if not isinstance(tree, Mapping):
        raise WeightsError(f"{origin}: holds {type(tree).__name__}, not a dict of arrays")
    params, stats = _unwrap(_regroup(tree), prefer, origin)
    flat = flatten(params)
    flat.update(flatten(stats, "batch_stats"))
    if not flat:
        raise WeightsError(f"{origin}: holds no arrays")
    for key, value in flat.items():
        if isinstance(value, Unreadable) or np.iscomplexobj(value):
            what = value.what if isinstance(value, Unreadable) else "complex"
            raise WeightsError(f"{origin}: {key} is {what}, which is not read: save it dense, in float32")
    bare = {printable(key.removeprefix("module.")): _float32(value) for key, value in flat.items()}
    notes = ("prefix 'module.' taken off",) if bare.keys() != flat.keys() else ()
    return Bundle(bare, dict(metadata), origin, any("/" in key for key in flat), notes)


def is_wrapped(tree: Mapping[str, Any]) -> bool:
    """Whether a mapping is a checkpoint around a state dict, not the state dict itself."""
    return any(isinstance(value, Mapping) or key in DVT_RESULTS for key, value in _regroup(tree).items())


def _regroup(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Turns flat keys "params/a/b" into nested ones, so that one unwrapping serves all formats."""
    for separator in "/.":
        inside = [key for key in tree if str(key).startswith(DVT_STATE + separator)]
        if inside:
            state = {key[len(DVT_STATE) + 1 :]: tree[key] for key in inside}
            return {**{key: value for key, value in tree.items() if key not in inside}, DVT_STATE: state}
    wrappers = (*PARAMS_KEYS, *EMA_KEYS, "batch_stats")
    if tree and all("/" in key and key.split("/")[0] in wrappers for key in tree):
        return nest(tree)
    return tree


def _unwrap(
    tree: Mapping[str, Any], prefer: str, origin: str, stats: Mapping[str, Any] | None = None
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The innermost parameters and the batch statistics that belong to them."""
    stats = tree["batch_stats"] if isinstance(tree.get("batch_stats"), Mapping) else stats
    wrappers = ((*EMA_KEYS, *PARAMS_KEYS), (*PARAMS_KEYS, *EMA_KEYS))[prefer == "params"]
    # DINO's two networks come last: a teacher beside a "model" is another model.
    for key in (*wrappers, *DINO_KEYS[:: 1 if prefer == "ema" else -1]):
        inner = tree.get(key)
        if isinstance(inner, Mapping) and inner:
            return _unwrap(inner, prefer, origin, stats)
    unknown = [key for key, value in tree.items() if _is_state_dict(value)]
    if len(unknown) > 1:
        raise WeightsError(
            f"{origin}: holds several state dicts ({', '.join(unknown)}): give one as a mapping"
        )
    if unknown:
        return _unwrap(tree[unknown[0]], prefer, origin, stats)
    others = ("batch_stats", *DVT_RESULTS)
    return {key: value for key, value in tree.items() if key not in others}, stats or {}


def _is_state_dict(value: Any) -> bool:
    """Whether a value is a torch state dict; our own trees nest where it has dots."""
    return isinstance(value, Mapping) and any("." in str(k) and hasattr(v, "shape") for k, v in value.items())


def _float32(value: np.ndarray) -> np.ndarray:
    """Half-precision files are widened; integers (index buffers) stay."""
    if (
        value.dtype in (np.float32, np.float64)
        or np.issubdtype(value.dtype, np.integer)
        or value.dtype == bool
    ):
        return value.astype(np.float32) if value.dtype == np.float64 else value
    return value.astype(np.float32)
