"""The student and the teacher of a run, fitted to the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn

from dyntoken import data, losses, models

if TYPE_CHECKING:
    from dyntoken.train.settings import Settings


def make_model(
    section: Mapping[str, Any], info: data.DataInfo, shape: tuple[int, int, int], what: str
) -> nn.Module:
    """The model of a section of the config, fitted to the data set.

    Args:
      section: `name` and keywords of `create_model`; classes, image size and
        channels come from the data unless given.
      info: of the data set.
      shape: `(H, W, C)` of the batches.
      what: the section's name, for messages.

    Raises:
      UnknownNameError: no such name or keyword.
      ValueError: no name, or a model for other images or classes.
    """
    options = dict(section)
    if not options.get("name"):
        raise ValueError(f"{what}.name is missing: see dyntoken.list_models()")
    size = shape[0] if shape[0] == shape[1] else shape[:2]
    facts = {"num_classes": info.num_classes, "img_size": size, "in_chans": shape[2]}
    try:
        model = models.create_model(options.pop("name"), **{**facts, **options})
    except ValueError as error:
        raise type(error)(f"{what}: {error}") from error
    if model.input_shape != shape or model.num_classes != info.num_classes:
        raise ValueError(
            f"{what} takes images {model.input_shape} of {model.num_classes} classes, but the data set "
            f"{info.name!r} gives {shape} of {info.num_classes}: leave img_size, in_chans and num_classes "
            "to the data"
        )
    return model


def make_teacher(settings: Settings, info: data.DataInfo, shape: tuple[int, int, int]) -> nn.Module | None:
    """The teacher that `config.teacher` names, None without one; arguments as of `make_model`.

    Raises:
      ValueError: a loss that needs a teacher and none, a teacher that no loss
        reads or that has no weights, or one with exits.
    """
    wanted = sorted(s.key for s in losses.parse(settings.losses) if "teacher" in losses.needs({s.key: {}}))
    section = dict(settings.teacher or {})
    source = section.pop("weights", None)
    if not section.get("name"):
        if wanted:
            raise ValueError(
                f"loss {wanted[0]!r} needs a teacher: set config.teacher.name and config.teacher.weights, "
                "or drop the loss"
            )
        return None
    if not wanted:
        raise ValueError("config.teacher is set but no loss reads it: add logit_kl, or clear teacher.name")
    if not source:
        raise ValueError("config.teacher.weights is empty: name a weight file (or a workdir) for the teacher")
    teacher = make_model(section, info, shape, "config.teacher")
    if hasattr(teacher, "exits"):
        raise ValueError(
            f"config.teacher.name is {section['name']!r}, which has exits: a teacher is one network. Name a "
            "plain model; the last exit of a model teaches its earlier ones through the loss exit_kl"
        )
    return teacher
