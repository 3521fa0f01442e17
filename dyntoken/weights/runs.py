"""What a checkpoint says of the run that made it: classes, model, preprocessing, average."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dyntoken import paths, schedules, workdirs
from dyntoken.cascade import Cascade
from dyntoken.models import OF_NAME, Model, create_model, keywords
from dyntoken.registry import UnknownNameError

SAID = "dyntoken"  # key of `images_said` in a file's header


def of_workdir(path: Any, step: int | str = "newest") -> dict[str, Any]:
    """What one checkpoint of a workdir says, see `workdirs.read_meta`; {} of whatever is none.

    Its key "run" holds `class_names`, `model` (keywords of `create_model`), `image_shape`,
    `mean`, `std` and what `Preprocess` takes besides; checkpoints from before it was
    written have "config" alone.
    """
    path = paths.resolve(path)
    try:
        return workdirs.read_meta(workdirs.step_folder(path, step)) if path.is_dir() else {}
    except (OSError, ValueError):
        return {}


def class_names(meta: Mapping[str, Any]) -> list[str]:
    """Of the run, [] where its data set or its checkpoint names none."""
    return list(meta.get("run", {}).get("class_names", ()))


def of_images(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the run says of its images and classes, {} where the checkpoint does not.

    "prepared" are fields of `preprocessing.Preprocess` as the run's evaluation reads its images (what it leaves
    at its default is written out: the defaults of a model's name are others), "size" is (height, width).
    """
    about = meta.get("run") or {}
    if not {"mean", "std", "image_shape"} <= about.keys():
        return {}
    usual = {"crop_pct": 0.875, "interpolation": "bicubic", "squash": False}
    how = {**usual, **{key: about[key] for key in ("crop_pct", "interpolation") if key in about}}
    how |= {key: tuple(about[key]) for key in ("mean", "std")}
    return {"prepared": how, "class_names": class_names(meta), "size": tuple(about["image_shape"][:2])}


def section_of(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """Keywords of `create_model` for the run's model, "name" among them; None where they are not known."""
    config = meta.get("config") or {}
    section = meta.get("run", {}).get("model")
    if section is None and config.get("model", {}).get("name") and config.get("data", {}).get("size"):
        section = {"img_size": config["data"]["size"], **config["model"]}
    if section is None:
        return None
    how = of_images(meta).get("prepared")
    return {**section, **({"prepared": tuple(sorted(how.items()))} if how else {})}


def recipe(model: Any) -> dict[str, str]:
    """The keywords of `create_model` for a model as metadata, {} where JSON cannot hold them."""
    if not isinstance(model, Model):
        return {}
    own = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in (*OF_NAME, "prepared")
    }
    found = {**dict(model.backbone.options), **own, **dict(model.method_options)}
    name = "_".join(filter(None, (model.method, model.arch)))
    known = keywords(name)
    try:
        return {
            "recipe": json.dumps(
                {"name": name, **{key: v for key, v in found.items() if key in known and key != "dtype"}}
            )
        }
    except TypeError:
        return {}


def images_said(model: Any, class_names: Sequence[str]) -> dict[str, str]:
    """What a model says of its images, and its class names, as metadata."""
    said = {"prepared": dict(model.prepared) if model is not None else {}, "class_names": list(class_names)}
    return {SAID: json.dumps(said)} if any(said.values()) else {}


def model_of(meta: Mapping[str, Any]) -> Any:
    """The model of the run, by `create_model`; None where the description lacks its images' size.

    Raises:
      ValueError: a model that this version cannot build.
    """
    section = section_of(meta)
    try:
        return None if section is None else create_model(**section)
    except UnknownNameError as error:
        config = meta.get("config") or {}
        if not (modules := ", ".join(config.get("plugins") or ())):
            raise
        raise UnknownNameError(f"{error} The run has plugins: import {modules} first, or --plugins") from None


def grids(model: Any) -> dict[str, str]:
    """The patches of a model as metadata, `{"grid": "16x32"}`, of a cascade one entry per exit."""
    if isinstance(model, Cascade):
        named = {f"grid/exit_{index}": grid for index, grid in enumerate(model.grids)}
    else:
        named = {"grid": model.plain().grid}
    return {name: "x".join(map(str, grid)) for name, grid in named.items()}


def grids_of(meta: Mapping[str, Any]) -> dict[str, str]:
    """`grids` of the run's model, {} where it is not known."""
    try:
        model = model_of(meta)
    except (TypeError, ValueError):
        return {}
    return {} if model is None else grids(model)


def strings(meta: Mapping[str, Any]) -> dict[str, str]:
    """What a `files.Bundle` keeps of a description: `grids`, and "average", a warning."""
    found = grids_of(meta)
    config = meta.get("config") or {}
    warning = schedules.ema_warning(
        int(meta.get("step", 0)), config.get("ema") or 0.0, warmup=config.get("ema_warmup", False)
    )
    return found | ({"average": warning} if warning else {})
