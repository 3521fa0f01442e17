"""Small models of every registered backbone, so that new ones are tested without being listed."""

import dataclasses

from dyntoken import architectures
from dyntoken.backbones import BACKBONES
from dyntoken.backbones.isotropic import Isotropic
from dyntoken.backbones.staged_dual_path import DualPathStages
from dyntoken.backbones.staged_regrown import RegrownStages

ISOTROPIC = {"width": 16, "heads": 2, "depth": 2, "img_size": 16, "patch_size": 4, "stem_width": 4}
REGROWN = {"widths": (8, 16), "heads": (1, 2), "mlp_ratios": (2, 2), "img_size": 16, "patch_size": 2}
DUAL_PATH = {"width": 8, "widths": (8, 16, 32), "heads": (1, 1, 2), "depths": (1, 1, 2)}
DUAL_PATH |= {"img_size": 32, "patch_size": 2, "window": 2, "kernel": 3}
SMALL = {Isotropic: ISOTROPIC, RegrownStages: REGROWN, DualPathStages: DUAL_PATH}
# What else a family wants, by its row in BACKBONES.
BESIDES = {
    # A small gamma: random weights would throw the points off the map.
    "psvit": {"points": 4, "iterations": 2, "gamma": 0.1, "stem_channels": (4, 4, 8, 4)},
    "cvt": {"patch_paddings": (0, 1)},  # maps of 7 x 7, whose keys are 4 x 4, and 4 x 4
    "convnext": {"widths": (4, 8, 16)},
}


def names(base: type, but: tuple[str, ...] = ()) -> list[str]:
    """The first model of each family whose backbone extends `base`, apart from some backbones."""
    firsts = [family.listed[0] for family in architectures.FAMILIES]
    rows = {first: architectures.parse(first).backbone for first in firsts}
    return [first for first, row in rows.items() if row not in but and issubclass(BACKBONES[row], base)]


def options(name: str) -> dict:
    """Fields of a small model of that name: two stages, the last of the full one, or two blocks."""
    arch = architectures.parse(name)
    make = BACKBONES[arch.backbone]
    base = next(base for base in SMALL if issubclass(make, base))
    fields = {field.name: arch.options.get(field.name, field.default) for field in dataclasses.fields(make)}
    found = {}
    if base is RegrownStages:
        found = {key: fields[key][-2:] for key in make.per_stage}
    found |= {key: value for key, value in SMALL[base].items() if key in fields}
    found |= BESIDES.get(arch.backbone, {})
    body = make(**{**arch.options, **found}, parent=None)
    return {**found, "pool": "token" if body.prefix else "mean"}
