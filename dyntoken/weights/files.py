"""Weight files as flat dicts of numpy arrays: safetensors, npz, orbax, torch, the hub.

Nothing here unpickles: `.npz` is read with `allow_pickle=False`, `.pth` only by
torch with `weights_only=True`.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from dyntoken import paths

# Names under which the public repositories wrap a state dict: DeiT, DynamicViT and EViT "model" (and its
# average "model_ema"), TPS "net", DVT "model_state_dict"; our own checkpoints "params" and "ema".
DVT_STATE = "model_state_dict"
PARAMS_KEYS = ("params", "model", "net", "state_dict", "module", DVT_STATE)
EMA_KEYS = ("ema", "model_ema", "state_dict_ema", "net_ema")
PREFERENCES = ("ema", "params")
# What DVT's checkpoints hold beside their weights; see `reference_dvt.stored_exits`.
DVT_RESULTS = ("flops", "anytime_classification", "dynamic_threshold", "budgeted_batch_classification")
PRETRAINED = epath.Path(__file__).resolve().parent / "pretrained"
SAFETENSORS_TYPES = {
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BF16": np.dtype(jnp.bfloat16),
    "BOOL": np.dtype(bool),
}


class WeightsError(ValueError):
    """A weight source that cannot be read or does not fit; one line with the remedy."""


@dataclasses.dataclass
class Bundle:
    """What a source held.

    Attributes:
      tensors: flat dict, key to array, in the file's own names and layouts.
      metadata: strings stored beside them (safetensors header), else empty.
      origin: the source, for messages.
      own: whether keys are paths of our tree ("backbone/trunk/blocks_0/...").
    """

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]
    origin: str
    own: bool


def read(source: Any, prefer: str = "ema", step: int | str = "newest") -> Bundle:
    """Reads a weight source.

    Args:
      source: path of a `.safetensors`, `.npz`, `.pth`/`.pt`/`.bin`/`.tar` file, an orbax
        directory, `"pretrained:NAME"` (ships with the package), `"hf:org/name[/file]"`,
        or a mapping (nested or flat) of arrays.
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
    if name.startswith("hf:"):
        name = fetch_hub(name)
    path = shipped(name) if name.startswith("pretrained:") else _place(name)
    if not path.exists():
        raise WeightsError(
            f"{name}: no such weight file or directory; put the weights there, or name others (a public "
            "checkpoint becomes ours by `python -m dyntoken.tools.convert IN OUT --model=NAME`)"
        )
    if path.is_dir():
        from dyntoken.weights import orbax

        return orbax.read(path, step), {}, name
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise WeightsError(
            f"{name}: unknown weight format {path.suffix!r}; known: {', '.join(READERS)}, orbax directory"
        )
    return (*reader(path), name)


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
        header = json.loads(data[8 : 8 + size])
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise damaged(path, "safetensors", error) from error
    return tensors, header.get("__metadata__") or {}


def _array(entry: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(entry["data"], SAFETENSORS_TYPES[entry["dtype"]]).reshape(entry["shape"])


def read_npz(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All arrays of an `.npz` file; object arrays (pickles) are refused."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}, {}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        if "allow_pickle" in str(error):
            raise WeightsError(
                f"{path}: holds pickled objects, which can run code and are never loaded; save plain arrays"
            ) from error
        raise damaged(path, "npz", error) from error


def read_torch(path: epath.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The nested dict of a torch checkpoint, tensors as numpy arrays; numbers, strings and lists as they are.

    Only with torch installed, and only with `weights_only=True`; the argument
    namespace that DeiT-style trainers store beside the weights is admitted.
    """
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path}: reading a torch checkpoint needs torch; install it with "
            "`pip install 'dyntoken[torch]'`, or convert the file to .safetensors where torch is installed"
        ) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged or unsafe file
        raise damaged(path, "torch", error) from error

    def convert(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            return (node.float() if node.dtype == torch.bfloat16 else node).numpy()
        if isinstance(node, Mapping):
            return {str(key): convert(value) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return [convert(value) for value in node]
        return node if isinstance(node, (int, float, str)) else None

    return convert(tree), {}


READERS = {
    ".safetensors": read_safetensors,
    ".npz": read_npz,
    ".pth": read_torch,
    ".pt": read_torch,
    ".bin": read_torch,
    ".tar": read_torch,
}


def fetch_hub(source: str) -> str:
    """Local path of `"hf:org/name[/file]"`, downloaded by huggingface_hub.

    Without a file name, `model.safetensors` is taken.
    """
    parts = source.removeprefix("hf:").split("/")
    if len(parts) < 2 or not all(parts):
        raise WeightsError(f"{source}: write hf:org/name or hf:org/name/file")
    try:
        import huggingface_hub
    except ImportError as error:
        raise WeightsError(
            f"{source}: needs huggingface_hub; install it with `pip install 'dyntoken[hub]'`, "
            "or download the file and give its path"
        ) from error
    try:
        return huggingface_hub.hf_hub_download(
            repo_id="/".join(parts[:2]), filename="/".join(parts[2:]) or "model.safetensors"
        )
    except Exception as error:  # network, missing repository, missing file, missing permission
        raise WeightsError(f"{source}: could not be downloaded ({_first_line(error)})") from error


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
    params, stats = _unwrap(_regroup(tree), prefer)
    flat = flatten(params)
    flat.update(flatten(stats, "batch_stats"))
    if not flat:
        raise WeightsError(f"{origin}: holds no arrays")
    flat = {key.removeprefix("module."): _float32(value) for key, value in flat.items()}
    return Bundle(flat, dict(metadata), origin, own=any("/" in key for key in flat))


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
    tree: Mapping[str, Any], prefer: str, stats: Mapping[str, Any] | None = None
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The innermost parameters and the batch statistics that belong to them."""
    stats = tree["batch_stats"] if isinstance(tree.get("batch_stats"), Mapping) else stats
    for key in (*EMA_KEYS, *PARAMS_KEYS) if prefer == "ema" else (*PARAMS_KEYS, *EMA_KEYS):
        inner = tree.get(key)
        if isinstance(inner, Mapping) and inner:
            return _unwrap(inner, prefer, stats)
    others = ("batch_stats", *DVT_RESULTS)
    return {key: value for key, value in tree.items() if key not in others}, stats or {}


def _float32(value: np.ndarray) -> np.ndarray:
    """Half-precision files are widened; integers (index buffers) stay."""
    if (
        value.dtype in (np.float32, np.float64)
        or np.issubdtype(value.dtype, np.integer)
        or value.dtype == bool
    ):
        return value.astype(np.float32) if value.dtype == np.float64 else value
    return value.astype(np.float32)


def damaged(path: Any, kind: str, error: Exception) -> WeightsError:
    """The error for a file that cannot be read."""
    return WeightsError(
        f"{path}: truncated or damaged {kind} file ({_first_line(error)}); copy or download it again"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:160]
