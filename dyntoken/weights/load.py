"""Weights of a model from a source: read, matched, fitted, checked, reported."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dyntoken.cascade import Cascade
from dyntoken.models import Model
from dyntoken.nn.reduction_sites import added
from dyntoken.ops import resample
from dyntoken.weights import files, from_dense, keys, layouts, placing, pos_embed, runs, trees
from dyntoken.weights.errors import WeightsError
from dyntoken.weights.shapes import fits, published

FORMAT = "dyntoken"
_log = logging.getLogger("dyntoken.weights")


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
      reset: of the missing ones those of the classifier, which `head="reset"` asked for.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: tuple[str, ...]
    notes: tuple[str, ...] = ()
    origin: str = ""
    reset: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.origin}: {len(self.loaded)} arrays loaded"]
        new = [path for path in self.missing if added(path) and path not in self.reset]
        reuse = [path for path in self.missing if path not in new and "/reuse_" in f"/{path}"]
        parts = {
            "arrays of the reduction method start fresh, as when fine-tuning from a dense model": new,
            "arrays of the reuse between exits start fresh": reuse,
            "arrays of the classifier start fresh on purpose (head=reset)": self.reset,
            "missing": [path for path in self.missing if path not in (*new, *reuse, *self.reset)],
        }
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
        which every exit starts from. A `.safetensors`, `.npz` or `.pth` file in timm's
        keys, in those of the official repositories, of transformers (see `foreign`) or
        in our own; a folder that `save_pretrained` wrote; an orbax workdir;
        "pretrained:NAME" (ships with the package); "hf:org/name[/file]";
        "https://...#sha256=..."; or a mapping of arrays.
      prefer: "ema" takes the average where the source holds one, or "params".
      step: of a workdir: "newest", "best" (by the run's `best_metric` among the
        checkpoints that were evaluated) or the number of a step.
      strict: missing or unexpected arrays are an error.
      unexpected: "error" refuses arrays that the model has no place for and that
        change what it computes (LayerScale, register tokens, further blocks; not
        other heads, buffers or predictors); "ignore" leaves them out.
      resize: how a position embedding of another grid is resized: "bicubic"
        (DeiT, EViT, TPS, transformers), "bilinear" (DynamicViT, PVT), "timm" (bicubic
        with antialias, as timm does for every model) or "dinov2" (official DINOv2); by
        default as the library of the source's keys does, else as the backbone's official code.
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
    bundle = source if isinstance(source, files.Bundle) else layouts.read(source, prefer, step)
    if resize is None and bundle.layout is not None:
        resize = bundle.layout.resize(bundle.tensors)
    shapes = trees.shapes_of(model)
    if not bundle.own:
        models = [model, from_dense.dense_of(model, 0)] if isinstance(model, Cascade) else [model]
        bundle = layouts.without_prefix(bundle, [trees.reference_keys(m) for m in models], prefer)
    found, left = _sort_for(model, bundle)
    spread = isinstance(model, Cascade) and not found  # none in its own keys: a dense model's
    if isinstance(model, Cascade) and spread:
        found, left = from_dense.spread(model, functools.partial(_sort_for, bundle=bundle), shapes)
    if head == "reset":
        found = {path: value for path, value in found.items() if not placing.of_head(path)}
    with _naming_theirs(model, bundle, prefer):
        _check_kinship(found, shapes, bundle)
        placing.check_blocks(found, shapes, bundle.origin)
        missing = tuple(path for path in shapes if path not in found)
        fresh = functools.partial(trees.initialised, model, seed)
        resized = pos_embed.fit_all(model, found, shapes, bundle, resize, source_grid, fresh)
        average = bundle.metadata.get("average") if prefer == "ema" else None
        notes = [*bundle.notes, *_notes(model, bundle), *([average] if average else [])]
        for path, old in placing.other_channels(found, shapes, model.input_shape[2]).items():
            if in_chans == "adapt":
                found[path] = placing.adapted(found[path], model.input_shape[2], bundle.origin)
                notes.append(f"{path}: from {old} to {model.input_shape[2]} channels")
        sized = all(
            tuple(value.shape) == tuple(shapes[path])
            for path, value in found.items()
            if not placing.of_head(path)
        )
        if unexpected == "error" and sized:  # of other sizes no keyword is the remedy
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
        tuple(filter(placing.of_head, missing)) if head == "reset" else (),
    )
    if strict and (missing or left):
        raise WeightsError(f"strict: the weights do not fit exactly: {'; '.join(str(report).splitlines())}")
    surprising = [path for path in missing if not added(path)]  # a dense checkpoint has no others
    telling = left or resized or average or bundle.notes
    if not return_report and ((surprising and head == "keep") or telling):
        _log.warning("%s", report)
    found.update(fresh(missing) if missing else {})
    variables = trees.nested_variables({path: found[path] for path in shapes})
    return (variables, report) if return_report else variables


def load_whole(model: Model, source: Any, **options: Any) -> tuple[Any, Report]:
    """As `load_weights`, variables and report, of a source that holds every array of the model.

    Raises:
      WeightsError: for one that does not.
    """
    variables, report = load_weights(model, source, return_report=True, **options)
    if report.missing:
        more = ", ..." if len(report.missing) > 3 else ""
        raise WeightsError(
            f"{report.origin}: holds no values for {len(report.missing)} of the model's arrays "
            f"({', '.join(report.missing[:3])}{more}), and freshly initialised ones tell nothing: "
            "train first and name the workdir, or give weights of this very model"
        )
    if report.unexpected or report.resized:
        _log.warning("%s", report)
    return variables, report


def save_weights(
    path: Any,
    variables: Mapping[str, Any],
    *,
    model: Model | None = None,
    class_names: Sequence[str] = (),
    **metadata: str,
) -> None:
    """Writes variables as `.safetensors` under our own keys.

    Args:
      path: target file; its folder is made.
      variables: `{"params": ...}`, with "batch_stats" where there are any.
      model: adds its name, keywords, patch grid and what it says of images (`model.prepared`) to the
        metadata, so that `load_pretrained` rebuilds it and a non-square position embedding can be
        resized later.
      class_names: one per class, kept in the metadata; `weights.class_names(path)` reads them.
      **metadata: further strings for the file's header.
    """
    tensors = {key: np.asarray(value) for key, value in trees.flat_variables(variables).items()}
    about = {"format": FORMAT, **metadata, **runs.images_said(model, class_names)}
    if model is not None:
        about = {
            "model": "_".join(filter(None, (model.method, model.arch))),
            **about,
            **runs.grids(model),
            **runs.recipe(model),
        }
    files.write_safetensors(path, tensors, about)


def _sort_for(model: Model, bundle: files.Bundle) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Arrays by the model's paths, and the source's keys that it does not want."""
    own = keys.KeyMap(keys.Entry(path, path) for path in trees.shapes_of(model)) if bundle.own else None
    return trees.sort(bundle.tensors, own or trees.reference_keys(model))


@contextlib.contextmanager
def _naming_theirs(model: Model, bundle: files.Bundle, prefer: str) -> Iterator[None]:
    """Says whose weights they are where they do not fit, if their sizes are those of another known model."""
    try:
        yield
    except WeightsError as error:
        theirs = published(bundle, prefer)
        if theirs is None or fits(model, theirs):
            raise
        name = "_".join(filter(None, (model.method, theirs)))
        raise WeightsError(
            f"{bundle.origin}: these are {theirs}'s weights, the model is {model.arch}: name it {name} "
            f"(of a run: --config.model.name={name})"
        ) from error


def _check_kinship(
    found: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], bundle: files.Bundle
) -> None:
    """Refuses weights that have little to do with the model."""
    own = [path for path in shapes if not added(path) and not placing.of_head(path)]
    matched = sum(path in found for path in own)
    if matched * 2 < len(own):
        layout = layouts.described(bundle)
        raise WeightsError(
            f"{bundle.origin}: weights of another model: they hold {matched} of its {len(own)} backbone arrays; "
            + (f"their keys are in {layout}; " if layout else "")
            + "give this model's weights in timm's keys, its official repository's or ours, or name another model"
        )


def _notes(model: Model, bundle: files.Bundle) -> list[str]:
    notes = []
    leaves = {key.rsplit("/", 1)[-1] for key in bundle.tensors}
    distilled = model.backbone.get("distilled", False)
    if "dist_token" in leaves and not distilled:
        notes.append(
            "distilled weights in a plain model: distillation token and head left out, class head used"
        )
    if distilled and "dist_token" not in leaves:
        notes.append("plain weights in a distilled model: distillation token and head start fresh")
    return notes
