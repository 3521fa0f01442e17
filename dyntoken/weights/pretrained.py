"""`load_pretrained`: a checkpoint as a model, its architecture read off the file and what lies beside it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dyntoken import architectures
from dyntoken.models import create_model, keywords, split_name
from dyntoken.nn.reduction_sites import added
from dyntoken.weights import configs, files, foreign, layouts, pixels, placing, runs, shapes
from dyntoken.weights.errors import WeightsError
from dyntoken.weights.load import Report, load_weights

OF_METHOD = ("keep", "at")
_log = logging.getLogger("dyntoken.weights")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a source says of its architecture.

    Attributes:
      name: of our model whose fields are the rest, None where it has none.
      fields: keywords of `create_model`, certain ones.
      assumed: keywords that neither the arrays nor a file beside them settle.
      words: the layout.
      grid: (rows, columns) of its position embedding, where known.
      family: row of `shapes.FAMILIES`.
    """

    name: str | None
    fields: dict[str, Any]
    assumed: dict[str, Any]
    words: str
    grid: tuple[int, int] | None = None
    family: str = ""


def load_pretrained(
    source: Any,
    *,
    name: str | None = None,
    method: str | None = None,
    keep: Any = None,
    at: Sequence[int] | None = None,
    img_size: Any = None,
    num_classes: int | None = None,
    resize: str | None = None,
    prefer: str = "ema",
    step: int | str = "newest",
    unexpected: str = "error",
    source_grid: tuple[int, int] | None = None,
    sha256: str | None = None,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    return_report: bool = False,
    **overrides: Any,
) -> Any:
    """A checkpoint as a model with its variables.

    The architecture comes from `config.json` beside the weights (transformers', timm's), from what
    our own files and workdirs say, and from the names and shapes of the arrays. What none of
    these tell (heads, epsilon and GELU of a bare state dict) is assumed, and said.

    Args:
      source: as in `load_weights`; of a folder or the hub, `config.json` is read, too.
      name: model of `list_models` for what would have to be assumed, or of a backbone
        that no array tells; the sizes still come from the arrays.
      method: reduction method, a row of `reducers.METHODS`; None: none, or that of our own run.
      keep, at: of the method, see `create_model`.
      img_size: pixels, `n` or `(height, width)`; by default the checkpoint's. Position embeddings are resized.
      num_classes: by default the checkpoint's; another number starts a fresh classifier, 0 leaves it out.
      resize: how position embeddings are resized, by default as the checkpoint's own library does; see `load_weights`.
      prefer, step, unexpected, source_grid, seed: see `load_weights`.
      sha256: checksum of an https source.
      config: what `config.json` says, in place of the one beside the weights.
      return_report: also return the `Report`.
      **overrides: any keyword of `create_model`; `in_chans` adapts the patch embedding.

    Returns:
      `(model, variables)`, with `return_report` also the report.

    Raises:
      WeightsError: unreadable or unknown source, or one that lacks arrays of the model.
      ValueError: keywords that do not fit the model or each other.
    """
    source, beside, path = _opened(source, sha256)
    config = beside[0] if config is None else config
    told = _told(path, step, config, beside[1])
    given = {"keep": keep, "at": at, "img_size": img_size, "num_classes": num_classes}
    given = {**{key: value for key, value in given.items() if value is not None}, **overrides}
    section = runs.section_of(runs.of_workdir(source, step)) if path is not None and path.is_dir() else None
    if section is not None:
        bundle, found = source, Found(section.pop("name"), section, {}, "a run of this library")
    else:
        bundle = layouts.read(source, prefer, step)
        found = _found(bundle, config, source_grid, prefer)
    given = {**({"prepared": tuple(sorted(told.fields.items()))} if told.fields else {}), **given}
    model = _model(found, name, method, given, str(source) if path is not None else "the given mapping")
    head = "keep" if found.fields.get("num_classes", model.num_classes) == model.num_classes else "reset"
    variables, report = load_weights(
        model,
        bundle,
        prefer=prefer,
        step=step,
        unexpected=unexpected,
        resize=resize or found.fields.get("resize"),
        in_chans="adapt" if "in_chans" in given else "keep",
        head=head,
        source_grid=source_grid or found.grid,
        seed=seed,
        return_report=True,
    )
    _check_whole(report, head)
    assumed = (
        {} if name or found.name else {key: value for key, value in found.assumed.items() if key not in given}
    )
    report = dataclasses.replace(
        report, notes=(*_lines(model, found.words, assumed, told, head), *report.notes)
    )
    if not return_report:
        _log.log(logging.WARNING if assumed or report.resized else logging.INFO, "%s", report)
    return (model, variables, report) if return_report else (model, variables)


def images_of(source: Any, step: int | str = "newest") -> dict[str, Any]:
    """What a run or the files of weights say of images: fields of `preprocessing.Preprocess`."""
    _, beside, path = _opened(source, None)
    return _told(path, step, *beside).fields


def prepared(model: Any, source: Any, step: int | str = "newest") -> Any:
    """The model, with `images_of` the source, for those who load it by `load_weights`."""
    fields = images_of(source, step)
    return model.clone(prepared=tuple(sorted(fields.items()))) if fields else model


def class_names(source: Any) -> tuple[str, ...]:
    """Of a checkpoint's classes: a run's, those in a file of ours, or as `config.json` beside it has them; else ()."""
    _, beside, path = _opened(source, None)
    return tuple(_said(path).get("class_names", ())) or configs.class_names(beside[0])


def _said(path: Any, step: int | str = "newest") -> dict[str, Any]:
    """What a run or a file of ours itself says of its images and classes, see `runs.of_images`."""
    if path is None or path.is_dir():
        return runs.of_images(runs.of_workdir(path, step)) if path is not None else {}
    return json.loads(files.header(path).get(runs.SAID, "{}"))


def _told(
    path: Any, step: int | str, config: Mapping[str, Any], processor: Mapping[str, Any]
) -> pixels.Pixels:
    """What a source says of images, or else the files beside it."""
    said = _said(path, step)
    if not said.get("prepared"):
        return pixels.told(config, processor)
    return pixels.of_own(said, "the run" if path.is_dir() else path.name)


def _opened(source: Any, sha256: str | None) -> tuple[Any, list[dict[str, Any]], Any]:
    """What `layouts.read` takes, the two JSON files beside it, and its place, None of a mapping."""
    if isinstance(source, Mapping):
        return source, [{}, {}], None
    names = (configs.FILE, pixels.FILE)
    path = files.local(str(source), sha256, names)
    there = not path.is_dir() and path.exists()
    return path, [configs.beside(path, name) if there else {} for name in names], path


def _found(
    bundle: files.Bundle, config: Mapping[str, Any], grid: tuple[int, int] | None, prefer: str
) -> Found:
    """What a source's arrays and the files beside them say."""
    about = bundle.metadata
    if "recipe" in about:
        fields = json.loads(about["recipe"])
        return Found(fields.pop("name"), fields, {}, "a file of this library")
    settled = configs.fields_of(config, bundle.origin)
    tensors = shapes.in_timm_keys(bundle, prefer)
    arch = settled.pop("arch", None) or about.get("model")
    family = settled.pop("family", "") or (bundle.layout.family if bundle.layout else "")
    words = (
        bundle.layout.words
        if bundle.layout
        else layouts.described(bundle) or "names of an official repository"
    )
    if not tensors:
        shown = ", ".join(list(bundle.tensors)[:3])
        return Found(arch, {}, {}, f"{words}: {shown}, ...")
    patch = tensors[shapes.PATCHES].shape[2:]
    grid = grid or _grid_of(about, settled.get("img_size"), patch, tensors.get("pos_embed"))
    fields, unsure = shapes.fields_of(tensors, grid, bundle.origin)
    usual = _usual(bundle, fields)
    assumed = {key: value for key, value in usual.items() if key not in settled and key not in fields}
    assumed |= {key: fields.pop(key) for key in unsure if key not in settled}
    gated = fields.get("activation") == "swiglu"
    fields |= {key: value for key, value in settled.items() if not (gated and key == "activation")}
    if "representation_size" not in fields:
        fields.pop("representation_act", None)
    where = None
    if fields["position"]:
        size = fields["img_size"]
        where = tuple(
            s // p for s, p in zip((size, size) if isinstance(size, int) else size, patch, strict=True)
        )
    return Found(arch, fields, assumed, words, where, family or shapes.family_of(fields))


def _usual(bundle: files.Bundle, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What models of a layout mostly have where nothing says it."""
    if bundle.layout is not None and bundle.layout.config:
        usual = configs.fields_of({"model_type": bundle.layout.config}, bundle.origin)
        return {
            key: usual[key] for key in ("norm_eps", "activation", "rope_base", "img_size") if key in usual
        }
    if fields.get("rope") == "centred":
        return {"norm_eps": 1e-5, "activation": "gelu", "rope_base": 100.0, "img_size": 256}
    if fields.get("rope") == "index":
        return {"norm_eps": 1e-6, "rope_base": 10000.0, "rope_grid": (16, 16)}
    return {"norm_eps": 1e-5 if fields["pre_norm"] else 1e-6, "activation": "gelu"}


def _grid_of(
    about: Mapping[str, str], size: Any, patch: Sequence[int], embedding: np.ndarray | None
) -> tuple[int, int] | None:
    """The patches that a file's header or the configuration names, if as many have positions."""
    if "x" in about.get("grid", ""):
        return tuple(map(int, about["grid"].split("x")))
    if size is None or embedding is None:
        return None
    rows, columns = (
        s // p for s, p in zip((size, size) if isinstance(size, int) else size, patch, strict=True)
    )
    return (rows, columns) if 0 <= embedding.shape[1] - rows * columns <= 64 else None


def _model(found: Found, name: str | None, method: str | None, given: dict[str, Any], origin: str) -> Any:
    """The model of what was found; what the caller gives comes first."""
    base = name or found.name
    fields = {**({} if base else found.assumed), **found.fields}
    if base is None:
        if not found.fields:
            known = ", ".join(dict.fromkeys(layout.words for layout in foreign.LAYOUTS))
            raise WeightsError(
                f"{origin}: its arrays are of no vision transformer that is recognised ({found.words}); read are "
                f"timm's ViT keys, ours, and {known}; pass name= for another model of list_models()"
            )
        base = shapes.name_of(found.family, fields)
    theirs, arch = split_name(base)
    first = method or theirs
    if first is None and (wrong := [key for key in OF_METHOD if key in given]):
        raise WeightsError(f"{wrong[0]}= needs method=, one of dyntoken.reducers.METHODS")
    whole = f"{first}_{arch}" if first else arch
    known = keywords(whole)
    if architectures.get(arch).backbone != "vit":  # arrays of another backbone say less
        fields = {key: value for key, value in fields.items() if found.name == base}
    fields = {key: value for key, value in fields.items() if key in known}
    if "img_size" not in given and "patch_size" in fields and _divided(fields):
        fields["rest"] = "drop"  # pixels that fill no patch of the published size
    return create_model(whole, **{**fields, **given})


def _divided(fields: Mapping[str, Any]) -> bool:
    """Whether an image is no whole number of patches."""
    sides, patch = (np.broadcast_to(fields.get(key, 0), 2) for key in ("img_size", "patch_size"))
    return bool((sides % patch).any())


def _check_whole(report: Report, head: str) -> None:
    """Raises `WeightsError` for arrays of the backbone that the source lacks."""
    absent = [
        path for path in report.missing if not added(path) and not (head == "reset" and placing.of_head(path))
    ]
    if absent:
        more = f", and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise WeightsError(
            f"{report.origin}: lacks {len(absent)} of the model's arrays ({', '.join(absent[:3])}{more}); "
            "create_model and load_weights start such ones fresh, if that is meant"
        )


def _lines(model: Any, words: str, assumed: Mapping[str, Any], told: pixels.Pixels, head: str) -> list[str]:
    """What was found, assumed and told of images, one line each."""
    body = model.plain()
    height, width, _ = model.input_shape
    facts = [
        f"{name} {getattr(body, name)}"
        for name in ("width", "depth", "heads", "patch_size", "registers")
        if getattr(body, name, 0)
    ]
    facts += [f"{height}x{width} pixels", f"{model.num_classes or 'no'} classes", f"pool {model.pool}"]
    facts += [f"epsilon {body.norm_eps:g}", getattr(body, "activation", "")]
    facts += [
        name for name in ("distilled", "qk_norm", "layer_scale", "pre_norm") if getattr(body, name, None)
    ]
    usual = (architectures.get(model.arch).options.get(key) for key in ("width", "depth"))
    named = (
        f"{model.arch}, "
        if tuple(usual) == (getattr(body, "width", None), getattr(body, "depth", None))
        else ""
    )
    lines = [f"found {words}: {named}{', '.join(filter(None, facts))}"]
    if assumed:
        listed = ", ".join(f"{key}={value!r}" for key, value in assumed.items())
        lines.append(
            f"assumed {listed}, which the file does not tell: pass them, or name=, if it is otherwise"
        )
    lines += told.lines((height, width))
    if head == "reset" and model.num_classes:
        lines.append(f"the classifier of {model.num_classes} classes starts fresh")
    return lines
