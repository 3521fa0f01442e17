"""Names of architectures: one table of families, each a pattern and what it stands for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Arch:
    """A named architecture.

    Attributes:
      backbone: row of `backbones.BACKBONES`.
      options: fields of that backbone.
      num_classes: default number of classes.
      crop_pct: share of the resized image that its official evaluation crops.
    """

    backbone: str
    options: dict[str, Any]
    num_classes: int = 1000
    crop_pct: float = 0.875


@dataclasses.dataclass(frozen=True)
class Family:
    """Names of one kind.

    Attributes:
      pattern: of a whole name.
      build: the match to an `Arch`.
      listed: the names that `list_models` shows.
    """

    pattern: str
    build: Callable[[re.Match[str]], Arch]
    listed: tuple[str, ...]


VIT = {  # width, depth, heads; timm's
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "mini": (64, 6, 2),  # ours: trains on a laptop CPU
}
T2T = {  # width, depth, heads, mlp_ratio; yitu-opensource/T2T-ViT
    "7": (256, 7, 4, 2.0),
    "10": (256, 10, 4, 2.0),
    "12": (256, 12, 4, 2.0),
    "14": (384, 14, 6, 3.0),
    "19": (448, 19, 7, 3.0),
    "24": (512, 24, 8, 3.0),
}
LVVIT = {  # width, depth, heads, skip_lam, channels of the stem; zihangJiang/TokenLabeling
    "t": (240, 12, 4, 1.0, 64),
    "s": (384, 16, 6, 2.0, 64),
    "m": (512, 20, 8, 2.0, 64),
    "l": (768, 24, 12, 3.0, 128),
}
PSVIT = {  # width, blocks after the sampling, heads, channels after the first bottleneck; yuexy/PS-ViT
    "ti": (192, 8, 3, 192),
    "b": (384, 10, 6, 256),
}
PVT = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3), "large": (3, 8, 27, 3)}  # depths
CVT = {  # widths, depths, heads, pixels; microsoft/CvT
    "13": ((64, 192, 384), (1, 2, 10), (1, 3, 6), 224),
    "21": ((64, 192, 384), (1, 4, 16), (1, 3, 6), 224),
    "w24": ((192, 768, 1024), (2, 2, 20), (3, 12, 16), 384),
}
SWIN = {  # width, blocks of the third stage, heads of the first; microsoft/Swin-Transformer
    "tiny": (96, 6, 3),
    "small": (96, 18, 3),
    "base": (128, 18, 4),
}
CONVNEXT = {  # width of the first stage, blocks of the third; facebookresearch/ConvNeXt
    "tiny": (96, 9),
    "small": (96, 27),
    "base": (128, 27),
}


def _vit(match: re.Match[str]) -> Arch:
    size, distilled, patch, pixels = match.groups()
    usual = (4, 28) if size == "mini" else (16, 224)
    options = {
        **dict(zip(("width", "depth", "heads"), VIT[size], strict=True)),
        "distilled": bool(distilled),
        "patch_size": int(patch or usual[0]),
        "img_size": int(pixels or usual[1]),
        "in_chans": 3,
    }
    if size == "mini":  # made for Fashion-MNIST
        return Arch("vit", {**options, "in_chans": 1, "stem": "conv"}, num_classes=10)
    return Arch("vit", options)


def _t2t(match: re.Match[str]) -> Arch:
    kind, number = match.groups()
    fields = dict(zip(("width", "depth", "heads", "mlp_ratio"), T2T[number], strict=True))
    kind = "transformer" if kind else "performer"
    return Arch("t2t", {**fields, "tokens_type": kind, "img_size": 224, "in_chans": 3})


def _lvvit(match: re.Match[str]) -> Arch:
    fields = dict(zip(("width", "depth", "heads", "skip_lam", "stem_width"), LVVIT[match[1]], strict=True))
    options = {**fields, "aux_weight": 0.5, "img_size": 224, "in_chans": 3}
    return Arch("lvvit", options, crop_pct=0.9 if match[1] in "ts" else 1.0)


def _psvit(match: re.Match[str]) -> Arch:
    width, depth, heads, middle = PSVIT[match[1]]
    fields = {"width": width, "depth": depth, "heads": heads, "points": int(match[2])}
    options = {**fields, "stem_channels": (64, 64, middle, 64), "img_size": 224, "in_chans": 3}
    return Arch("psvit", options, crop_pct=0.9)


def _pvt(match: re.Match[str]) -> Arch:
    return Arch("pvt", {"depths": PVT[match[1]], "img_size": 224, "in_chans": 3})


def _cvt(match: re.Match[str]) -> Arch:
    widths, depths, heads, usual = CVT[match[1]]
    size = int(match[2] or usual)
    options = {"widths": widths, "depths": depths, "heads": heads, "img_size": size, "in_chans": 3}
    return Arch("cvt", options, crop_pct=1.0 if size >= 384 else 0.875)


def _swin(match: re.Match[str]) -> Arch:
    width, depth, heads = SWIN[match[1]]
    fields = {"width": width, "depths": (2, 2, depth, 2), "heads": tuple(heads * 2**s for s in range(4))}
    patch, window, pixels = (
        int(given or usual) for given, usual in zip(match.groups()[1:], (4, 7, 224), strict=True)
    )
    return Arch("swin", {**fields, "patch_size": patch, "window": window, "img_size": pixels, "in_chans": 3})


def _convnext(match: re.Match[str]) -> Arch:
    width, depth = CONVNEXT[match[1]]
    fields = {"widths": tuple(width * 2**s for s in range(4)), "depths": (3, 3, depth, 3)}
    return Arch("convnext", {**fields, "img_size": 224, "in_chans": 3})


FAMILIES = [
    Family(
        rf"(?:deit|vit)_({'|'.join(VIT)})(_distilled)?(?:_patch(\d+)_(\d+))?",
        _vit,
        (
            *(f"{f}_{s}_patch16_224" for f in ("deit", "vit") for s in ("tiny", "small", "base")),
            *(f"deit_{s}_distilled_patch16_224" for s in ("tiny", "small", "base")),
            "deit_small_patch16_384",
            "deit_base_patch16_384",
            "deit_base_distilled_patch16_384",
            "vit_large_patch16_224",
            "vit_mini_patch4_28",
        ),
    ),
    Family(
        rf"t2t_vit_(t_)?({'|'.join(T2T)})",
        _t2t,
        tuple(f"t2t_vit_{n}" for n in (*T2T, "t_14", "t_19", "t_24")),
    ),
    Family(rf"lvvit_({'|'.join(LVVIT)})", _lvvit, tuple(f"lvvit_{size}" for size in LVVIT)),
    Family(
        rf"psvit_({'|'.join(PSVIT)})_(\d+)",  # the number: points per side
        _psvit,
        ("psvit_ti_14", *(f"psvit_b_{n}" for n in (10, 14, 16, 18))),
    ),
    Family(rf"pvt_({'|'.join(PVT)})", _pvt, tuple(f"pvt_{size}" for size in PVT)),
    Family(
        rf"cvt_({'|'.join(CVT)})(?:_(\d+))?",
        _cvt,
        (*(f"cvt_{size}" for size in CVT), "cvt_13_384", "cvt_21_384"),
    ),
    Family(
        rf"swin_({'|'.join(SWIN)})(?:_patch(\d+)_window(\d+)_(\d+))?",
        _swin,
        (*(f"swin_{s}_patch4_window7_224" for s in SWIN), "swin_base_patch4_window12_384"),
    ),
    Family(rf"convnext_({'|'.join(CONVNEXT)})", _convnext, tuple(f"convnext_{size}" for size in CONVNEXT)),
]
CASCADE = "dvt"  # prefix of a cascade over any of these
CASCADES = (*(f"deit_{s}" for s in ("tiny", "small", "base")), *(f"t2t_vit_{n}" for n in T2T))
MULTIEXIT = "multiexit"  # prefix of a dense model with classifiers after some of its blocks
REDUCED_CASCADES = ("deit_tiny", "deit_small", "t2t_vit_12", "t2t_vit_14")  # listed with each method


def listed() -> tuple[str, ...]:
    """The names without a method that `list_models` shows."""
    return tuple(name for family in FAMILIES for name in family.listed)


def register(archs: Mapping[str, Arch]) -> None:
    """Adds a family of whole names.

    Raises:
      ValueError: a name that stands for an architecture already, or is no word.
    """
    for name in archs:
        if not re.fullmatch(r"[A-Za-z][\w.]*", name):
            raise ValueError(f"model {name!r}: a name is one word of letters, digits, dots and underscores")
        if parse(name) is not None:
            raise ValueError(f"model {name!r} is registered already: choose another name")
    FAMILIES.append(Family("|".join(map(re.escape, archs)), lambda match: archs[match[0]], tuple(archs)))


def parse(name: str) -> Arch | None:
    """The architecture of a name without its method, or None."""
    for family in FAMILIES:
        match = re.fullmatch(family.pattern, name)
        if match:
            return family.build(match)
    return None


def get(name: str) -> Arch:
    """The architecture of a name without its method that there is."""
    arch = parse(name)
    assert arch is not None, name
    return arch
