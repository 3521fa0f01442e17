"""Backbone families, one file and one line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from dyntoken import architectures
from dyntoken.backbones.base import Backbone
from dyntoken.registry import Table, check_options

BACKBONES = Table(
    "backbone",
    {
        "vit": "dyntoken.backbones.vit:ViT",
        "t2t": "dyntoken.backbones.t2t:T2T",
        "lvvit": "dyntoken.backbones.lvvit:LVViT",
        "psvit": "dyntoken.backbones.psvit:PSViT",
        "pvt": "dyntoken.backbones.pvt:PVT",
        "cvt": "dyntoken.backbones.cvt:CvT",
        "convnext": "dyntoken.backbones.convnext:ConvNeXt",
        "swin": "dyntoken.backbones.swin:Swin",
    },
)


def register_backbone(
    name: str,
    make: type[nn.Module],
    models: Mapping[str, Mapping[str, Any]],
    *,
    num_classes: int = 1000,
    crop_pct: float = 0.875,
) -> None:
    """Adds a backbone and the names of its models.

    Args:
      name: of the family.
      make: a subclass of one in `BACKBONES`, of `isotropic.Isotropic` (a stem
        before blocks of one width), `staged_regrown.RegrownStages` or `staged_dual_path.DualPathStages`.
        One that extends another reads its public checkpoints.
      models: name of a model (without a method) -> fields of `make`.
      num_classes, crop_pct: see `architectures.Arch`.

    Raises:
      UnknownNameError: no such field.
      ValueError: a name that is taken, or no backbone.
    """
    if not (isinstance(make, type) and issubclass(make, Backbone)):
        raise ValueError(
            f"backbone {name!r} must subclass Isotropic, RegrownStages or DualPathStages, got {make!r}"
        )
    missing = [wanted for wanted in make.required if not hasattr(make, wanted)]
    if missing:
        raise ValueError(f"backbone {name!r} does not define {', '.join(missing)}")
    fields = {field.name: field.default for field in dataclasses.fields(make)}
    archs = {}
    for model, options in models.items():
        check_options(f"model {model!r}", options, fields.keys() - {"sites", "parent", "name"})
        shape = {key: fields[key] for key in ("img_size", "in_chans")}
        archs[model] = architectures.Arch(name, {**shape, **options}, num_classes, crop_pct)
    if name in BACKBONES:
        BACKBONES.register(name, make)  # says so
    architectures.register(archs)
    BACKBONES.register(name, make)
