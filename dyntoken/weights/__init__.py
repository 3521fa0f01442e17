"""Trees in, trees out: load, save and import weights.

`load_weights` reads our own checkpoints and public ones (timm's DeiT keys);
`import_reference` turns an official model of a reduction method, constructor
arguments and state dict, into a model of this library with its variables.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyntoken.cascade import Cascade
from dyntoken.models import Model
from dyntoken.nn.reduction_sites import added
from dyntoken.ops import resample
from dyntoken.weights import dense_start, files, keys, layouts, placing, positions, references, runs
from dyntoken.weights.files import WeightsError
from dyntoken.weights.reference_dvt import StoredExits, stored_exits

__all__ = [
    "Report",
    "StoredExits",
    "WeightsError",
    "export_reference",
    "import_reference",
    "load_weights",
    "reference_keys",
    "save_weights",
    "stored_exits",
    "with_image_size",
]

FORMAT = "dyntoken"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a weight source, by path of our tree (`unexpected`: the source's keys).

    Attributes:
      loaded: taken over.
      missing: not in the source, freshly initialised.
      unexpected: in the source, not in the model.
      resized: position embeddings brought to another grid, "path: old -> new".
      notes: further things to know.
      origin: the source.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: tuple[str, ...]
    notes: tuple[str, ...] = ()
    origin: str = ""

    def __str__(self) -> str:
        lines = [f"{self.origin}: {len(self.loaded)} arrays loaded"]
        new = tuple(path for path in self.missing if added(path) or "/reuse_" in f"/{path}")
        missing = tuple(path for path in self.missing if path not in new)
        parts = {"new with the method, freshly initialised": new, "missing": missing}
        for what, names in {**parts, "unexpected": self.unexpected, "resized": self.resized}.items():
            if names:
                more = f", and {len(names) - 6} more" if len(names) > 6 else ""
                lines.append(f"  {len(names)} {what}: {', '.join(names[:6])}{more}")
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)


def load_weights(
    model: Model,
    source: Any,
    *,
    prefer: str = "ema",
    step: int | str = "newest",
    strict: bool = False,
    unexpected: str = "error",
    resize: str | None = None,
    in_chans: str = "keep",
    head: str = "keep",
    source_grid: tuple[int, int] | None = None,
    seed: int = 0,
    return_report: bool = False,
) -> Any:
    """Variables of `model` with the weights of `source`.

    Args:
      model: from `create_model`.
      source: weights of the model; of a cascade also those of the dense model,
        which every exit starts from. A `.safetensors`, `.npz` or `.pth` file in timm's DeiT keys, in
        those of the official repositories, or in our own; an orbax workdir;
        "pretrained:NAME" (ships with the package); "hf:org/name[/file]"; or a
        mapping of arrays.
      prefer: "ema" takes the average where the source holds one, or "params".
      step: of a workdir: "newest", "best" (by the run's `best_metric` among the
        checkpoints that were evaluated) or the number of a step.
      strict: missing or unexpected arrays are an error.
      unexpected: "error" refuses arrays that the model has no place for and that
        change what it computes (LayerScale, register tokens, further blocks; not
        other heads, buffers or predictors); "ignore" leaves them out.
      resize: how a position embedding of another grid is resized: "bicubic"
        (DeiT, EViT, TPS), "bilinear" (DynamicViT, PVT) or "timm" (bicubic with
        antialias, as timm does for every model); by default as the backbone's
        official code does.
      in_chans: "keep", or "adapt" to sum or repeat the stem's kernel for images
        of another number of channels, as timm does.
      head: "keep", or "reset" to leave the classifier freshly initialised.
      source_grid: (rows, columns) of the source's patches if they are no square.
      seed: of what is freshly initialised.
      return_report: also return the `Report`.

    Returns:
      `variables`, or `(variables, report)`.

    Raises:
      WeightsError: unreadable source, weights of another model or shape.
    """
    placing.check_choice("head", head, ("keep", "reset"))
    placing.check_choice("unexpected", unexpected, ("error", "ignore"))
    placing.check_choice("in_chans", in_chans, ("keep", "adapt"))
    placing.check_choice("resize", resize, (None, *resample.METHODS))
    bundle = layouts.from_flax_vit(files.read(source, prefer, step))
    shapes = shapes_of(model)
    if not bundle.own:
        dense = [dense_start.dense_of(model, 0)] if isinstance(model, Cascade) else []
        bundle = layouts.without_prefix(bundle, [reference_keys(m) for m in (model, *dense)], prefer)
    found, left = _sort_for(model, bundle)
    spread = dense_start.applies(model, found)
    if spread:
        found, left = dense_start.spread(model, functools.partial(_sort_for, bundle=bundle), shapes)
    if head == "reset":
        found = {path: value for path, value in found.items() if not placing.of_head(path)}
    _check_kinship(found, shapes, bundle)
    placing.check_blocks(found, shapes, bundle.origin)
    missing = tuple(path for path in shapes if path not in found)
    fresh = functools.partial(_initialised, model, seed)
    resized = positions.fit_all(model, found, shapes, bundle, resize, source_grid, fresh)
    average = bundle.metadata.get("average") if prefer == "ema" else None
    notes = [*bundle.notes, *_notes(model, bundle, missing), *([average] if average else [])]
    for path, old in placing.other_channels(found, shapes, model.input_shape[2]).items():
        if in_chans == "adapt":
            found[path] = placing.adapted(found[path], model.input_shape[2], bundle.origin)
            notes.append(f"{path}: from {old} to {model.input_shape[2]} channels")
    if unexpected == "error":
        placing.refuse(model, placing.changing(left, head), bundle.tensors, bundle.origin)
    placing.check_shapes(found, shapes, bundle.origin, model.input_shape[2])
    if spread:
        notes.append("weights of a dense model: every exit starts from them, the reuse between exits fresh")
    report = Report(
        tuple(p for p in shapes if p in found),
        missing,
        left,
        tuple(resized),
        tuple(notes),
        bundle.origin,
    )
    if strict and (missing or left):
        raise WeightsError(f"strict: the weights do not fit exactly: {'; '.join(str(report).splitlines())}")
    surprising = [path for path in missing if not added(path)]  # a dense checkpoint has no others
    telling = left or resized or average or bundle.notes
    if not return_report and ((surprising and head == "keep") or telling):
        _log.warning("%s", report)
    found.update(fresh(missing) if missing else {})
    variables = _variables({path: found[path] for path in shapes})
    return (variables, report) if return_report else variables


def save_weights(
    path: Any, variables: Mapping[str, Any], *, model: Model | None = None, **metadata: str
) -> None:
    """Writes variables as `.safetensors` under our own keys.

    Args:
      path: target file; its folder is made.
      variables: `{"params": ...}`, with "batch_stats" where there are any.
      model: adds its name and patch grid to the metadata, so that a non-square
        position embedding can be resized later.
      **metadata: further strings for the file's header.
    """
    tensors = {key: np.asarray(value) for key, value in flat_variables(variables).items()}
    about = {"format": FORMAT, **metadata}
    if model is not None:
        about = {"model": "_".join(filter(None, (model.method, model.arch))), **about, **runs.grids(model)}
    files.write_safetensors(path, tensors, about)


def import_reference(
    repository: str, cls: str, constructor: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[Model, dict[str, Any]]:
    """An official model as a model of this library.

    Args:
      repository: e.g. "timm", "raoyongming/DynamicViT",
        "megvii-research/TPS-CVPR2023", "youweiliang/evit",
        "yitu-opensource/T2T-ViT", "blackfeather-wang/Dynamic-Vision-Transformer".
      cls: class name in that repository, e.g. "VisionTransformerDiffPruning".
      constructor: its constructor arguments; layers are given as text
        (`norm_layer="LayerNorm(eps=1e-6)"`).
      tensors: its state dict as numpy arrays, own key names and layouts; or a
        whole checkpoint that wraps one (`model_state_dict` and the like).

    Returns:
      `(model, variables)`.

    Raises:
      WeightsError: unknown class or argument, or tensors that are missing, left
        over or of another shape.
    """
    reference = references.build(repository, cls, constructor)
    if files.is_wrapped(tensors):
        tensors = files.read(tensors, "params").tensors
    shapes = shapes_of(reference.model)
    key_map = keys.key_map(shapes, family_of(reference.model), grid_only=reference.grid_only)
    origin = f"{repository} {cls}"
    arrays = {key: np.asarray(value) for key, value in tensors.items() if not keys.is_buffer(key)}
    bundle = layouts.without_prefix(files.Bundle(arrays, {}, origin, own=False), [key_map], "params")
    found, unexpected = _sort(bundle, key_map)
    missing = [key_map.by_path[path].key for path in shapes if path not in found]
    if missing or unexpected:
        raise WeightsError(
            f"{origin}: the state dict does not fit the constructor arguments; "
            f"missing: {_listed(missing)}; left over: {_listed(unexpected)}"
        )
    placing.check_shapes(found, shapes, origin, reference.model.input_shape[2])
    return reference.model, _variables(found)


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - 6} more" if len(names) > 6 else ""
    return f"{', '.join(names[:6]) or 'none'}{more}"


def reference_keys(model: Model, *, no_embed_class: bool = False) -> keys.KeyMap:
    """The key map between `model` and the public format of its backbone."""
    grid_only = model.plain().prefix if no_embed_class else 0
    return keys.key_map(shapes_of(model), family_of(model), grid_only=grid_only)


def export_reference(
    model: Model, variables: Mapping[str, Any], *, no_embed_class: bool = False
) -> dict[str, np.ndarray]:
    """Variables, or their gradients, under the reference's own keys and layouts."""
    return reference_keys(model, no_embed_class=no_embed_class).export(flat_variables(variables))


def with_image_size(model: Model, size: tuple[int, int]) -> Model:
    """`model` for images of another (height, width); `load_weights` fits its position embedding."""
    return model.clone(backbone=model.backbone.with_(img_size=tuple(int(n) for n in size)))


def family_of(model: Model) -> str:
    """Row of `keys.RULES` for a model's backbone."""
    for cls in model.backbone.make.__mro__:  # a subclass has the keys of what it extends
        if cls.__name__ in keys.FAMILIES:
            return keys.FAMILIES[cls.__name__]
    name = model.backbone.make.__name__
    raise WeightsError(f"{model.arch}: no public key names are known for backbone {name}")


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """Flat tree of `model`, path to shape; nothing is computed."""
    return dict(_shapes(model))


@functools.lru_cache(maxsize=16)
def _shapes(model: Model) -> tuple[tuple[str, tuple[int, ...]], ...]:
    images = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    return tuple((path, tuple(leaf.shape)) for path, leaf in _flat(tree).items())


def flat_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables as a flat dict: parameters by path, statistics under "batch_stats/"."""
    return _flat(variables if "params" in variables else {"params": variables})


def _flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for collection, tree in variables.items():
        if collection not in ("params", "batch_stats"):
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            flat[name if collection == "params" else f"{collection}/{name}"] = leaf
    return flat


def _variables(flat: Mapping[str, Any]) -> dict[str, Any]:
    params = {path: jnp.asarray(value) for path, value in flat.items() if not path.startswith("batch_stats/")}
    stats = {path: jnp.asarray(value) for path, value in flat.items() if path.startswith("batch_stats/")}
    return {"params": files.nest(params), **files.nest(stats)}


def _own_keys(shapes: Mapping[str, tuple[int, ...]]) -> keys.KeyMap:
    return keys.KeyMap(keys.Entry(path, path) for path in shapes)


def _sort_for(model: Model, bundle: files.Bundle) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Arrays by the model's paths, and the source's keys that it does not want."""
    shapes = shapes_of(model)
    return _sort(bundle, _own_keys(shapes) if bundle.own else keys.key_map(shapes, family_of(model)))


def _sort(bundle: files.Bundle, key_map: keys.KeyMap) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Arrays by our path, and the source's keys that no parameter wants."""
    found: dict[str, np.ndarray] = {}
    unexpected = []
    for key, value in key_map.spelled(bundle.tensors).items():
        entry = key_map.find(key)
        if entry is not None and entry.path not in found:
            found[entry.path] = entry.from_reference(value)
        elif entry is not None and np.array_equal(entry.from_reference(value), found[entry.path]):
            continue  # a shared layer, listed once more
        elif not keys.is_buffer(key):
            unexpected.append(key)
    return found, tuple(unexpected)


def _check_kinship(
    found: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], bundle: files.Bundle
) -> None:
    """Refuses weights that have little to do with the model."""
    own = [path for path in shapes if not added(path) and not placing.of_head(path)]
    matched = sum(path in found for path in own)
    if matched * 2 < len(own):
        layout = layouts.recognised(bundle.tensors)
        raise WeightsError(
            f"{bundle.origin}: weights of another model: they hold {matched} of its {len(own)} backbone arrays; "
            + (f"their keys are in {layout}; " if layout else "")
            + "give this model's weights in timm's keys, its official repository's or ours, or name another model"
        )


def _notes(model: Model, bundle: files.Bundle, missing: tuple[str, ...]) -> list[str]:
    notes = []
    leaves = {key.rsplit("/", 1)[-1] for key in bundle.tensors}
    distilled = model.backbone.get("distilled", False)
    if "dist_token" in leaves and not distilled:
        notes.append(
            "distilled weights in a plain model: distillation token and head left out, class head used"
        )
    if distilled and "dist_token" not in leaves:
        notes.append("plain weights in a distilled model: distillation token and head start fresh")
    fresh = sum(map(added, missing))
    if fresh:
        notes.append(
            f"{fresh} arrays of the reduction method start fresh, as when fine-tuning from a dense model"
        )
    return notes


def _initialised(model: Model, seed: int, paths: Sequence[str]) -> dict[str, Any]:
    """What `init` gives at some paths; the compiler drops all else, the forward pass included."""

    def init(key: Any) -> dict[str, Any]:
        flat = _flat(model.init(key, jnp.zeros((1, *model.input_shape), jnp.float32)))
        return {path: flat[path] for path in paths}

    return jax.jit(init)(jax.random.key(seed))
