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
      num_classes: default number of classes; 0 where the public weights have no classifier.
      crop_pct: share of the resized image that its official evaluation crops.
      head: fields of the model around the backbone (`models.Model`).
      pixels: row of `PIXELS`, None for those of the data set.
      squash: that evaluation stretches the whole image to the model's size.
    """

    backbone: str
    options: dict[str, Any]
    num_classes: int = 1000
    crop_pct: float = 0.875
    head: dict[str, Any] = dataclasses.field(default_factory=dict)
    pixels: str | None = None
    squash: bool = False


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


PIXELS = {  # mean and standard deviation of pixels in [0, 1]
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
VIT = {  # width, depth, heads; timm's
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "medium": (512, 12, 8),
    "huge": (1280, 32, 16),
    "mini": (64, 6, 2),  # ours: trains on a laptop CPU
}
DINOV2 = {size: VIT[size] for size in ("small", "base", "large")} | {"giant": (1536, 40, 24)}
DINOV3 = {size: VIT[size] for size in ("tiny", "small", "base", "large")}
DINOV3 |= {"small_plus": VIT["small"], "huge_plus": (1280, 32, 20), "7b": (4096, 40, 32)}
GATED = {
    "small_plus": 1536,
    "huge_plus": 5120,
    "7b": 8192,
}  # of DINOv3: half the rows of the MLP's first layer
CLIP = {size: VIT[size] for size in ("medium", "base", "large", "huge")} | {"giant": (1408, 40, 16, 48 / 11)}
SIGLIP = {size: (*VIT[size], 4.0) for size in ("base", "large")}
SIGLIP |= {"so400m": (1152, 27, 16, 3.7362), "giantopt": (1536, 40, 16, 4.0)}
TANH = ("base_32", "large_512", "so400m_16", "giantopt_16")  # of SigLIP: timm builds these with tanh GELU
EVA02 = {size: VIT[size] for size in ("tiny", "small", "base", "large")}
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


def _shape(row: tuple[Any, ...], patch: Any, pixels: Any) -> dict[str, Any]:
    """Fields of a ViT whose public weights are timm's."""
    names = ("width", "depth", "heads", "mlp_ratio")
    sizes = {"patch_size": int(patch), "img_size": int(pixels), "in_chans": 3}
    return {**dict(zip(names, row, strict=False)), **sizes, "resize": "timm"}


def _vit(match: re.Match[str]) -> Arch:
    family, size, distilled, patch, pixels = match.groups()
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
    if family == "vit":  # AugReg's, trained on pixels in [-1, 1]
        crop = 0.9 if options["img_size"] < 384 else 1.0
        return Arch("vit", {**options, "resize": "timm"}, crop_pct=crop, pixels="half")
    return Arch("vit", options)


def _deit3(match: re.Match[str]) -> Arch:
    size, patch, pixels = match.groups()
    shape = _shape(VIT[size], patch or (14 if size == "huge" else 16), pixels or 224)
    options = {**shape, "embed_class": False, "layer_scale": 1e-6}
    return Arch("vit", options, crop_pct=1.0, pixels="imagenet")


def _clip(match: re.Match[str]) -> Arch:
    size, patch, quick, pixels = match.groups()
    options = {**_shape(CLIP[size], patch, pixels), "pre_norm": True, "norm_eps": 1e-5}
    options["activation"] = "quick_gelu" if quick else "gelu"
    crop = 0.9 if size in ("medium", "base") and int(pixels) == 224 else 1.0
    return Arch("vit", options, crop_pct=crop, pixels="clip")


def _dinov2(match: re.Match[str]) -> Arch:
    size, registers = match.groups()
    options = {**_shape(DINOV2[size], 14, 518), "layer_scale": 1e-5}
    if size == "giant":
        options |= {"activation": "swiglu", "mlp_hidden": 8192}
    if registers:
        options |= {"registers": 4, "embed_class": False}
    return Arch("vit", options, num_classes=0, crop_pct=1.0, pixels="imagenet")


def _dinov3(match: re.Match[str]) -> Arch:
    size, biases = match.groups()
    rope = {"rope": "centred", "rope_layout": "halves", "rope_base": 100.0, "position": False}
    options = {**_shape(DINOV3[size], 16, 256), **rope, "registers": 4, "layer_scale": 1e-5}
    options |= {"qkv_bias": "qv" if biases else False, "norm_eps": 1e-5, "naming": "eva"}
    if size in GATED:
        options |= {"activation": "swiglu", "mlp_hidden": 2 * GATED[size], "mlp_split": True}
    return Arch("vit", options, num_classes=0, crop_pct=1.0, head={"pool": "mean"}, pixels="imagenet")


def _siglip(match: re.Match[str]) -> Arch:
    size, patch, averaged, pixels = match.groups()
    options = {**_shape(SIGLIP[size], patch, pixels), "class_token": False}
    if {f"{size}_{patch}", f"{size}_{pixels}"} & set(TANH):
        options["activation"] = "gelu_tanh"
    if int(pixels) % int(patch):  # 384 at patch 14: 27 x 27 patches, the rest is never seen
        options["rest"] = "drop"
    head = {"pool": "mean" if averaged else "map"}
    return Arch("vit", options, num_classes=0, crop_pct=0.9, head=head, pixels="half")


def _eva02(match: re.Match[str]) -> Arch:
    size, patch, clip, pixels = match.groups()
    rope = {"rope": "index", "rope_layout": "pairs", "rope_base": 10000.0, "rope_grid": (16, 16)}
    options = {**_shape(EVA02[size], patch, pixels), **rope, "qkv_bias": "qv", "naming": "eva"}
    options |= {"activation": "swiglu", "mlp_hidden": 2 * (options["width"] * 8 // 3)}
    if size in ("base", "large"):
        options |= {"mlp_split": True, "mlp_norm": True, "naming": "eva_unfused"}
    if clip:
        options["attn_norm"] = True
    else:
        options["final_norm"] = False
    head = {} if clip else {"pool": "mean", "fc_norm": True}
    classes = 0 if int(pixels) == 224 and not clip else 1000
    size = int(pixels)
    reading = {"crop_pct": 0.9 if size == 224 else 1.0, "pixels": "clip", "squash": size >= 448}
    return Arch("vit", options, num_classes=classes, head=head, **reading)


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
        rf"(deit|vit)_({'|'.join(VIT)})(_distilled)?(?:_patch(\d+)_(\d+))?",
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
        r"deit3_(small|medium|base|large|huge)(?:_patch(\d+)_(\d+))?",
        _deit3,
        (*(f"deit3_{s}_patch16_224" for s in ("small", "medium", "base", "large")), "deit3_huge_patch14_224"),
    ),
    Family(
        rf"vit_({'|'.join(CLIP)})_patch(\d+)_clip(_quickgelu)?_(\d+)",
        _clip,
        ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224", "vit_large_patch14_clip_224"),
    ),
    Family(
        rf"vit_({'|'.join(DINOV2)})_patch14(_reg4)?_dinov2",
        _dinov2,
        tuple(f"vit_{size}_patch14{reg}_dinov2" for size in DINOV2 for reg in ("", "_reg4")),
    ),
    Family(
        rf"vit_({'|'.join(DINOV3)})_patch16_dinov3(_qkvb)?",
        _dinov3,
        tuple(f"vit_{s}_patch16_dinov3" for s in ("small", "small_plus", "base", "large", "huge_plus", "7b")),
    ),
    Family(
        rf"vit_({'|'.join(SIGLIP)})_patch(\d+)_siglip(_gap)?_(\d+)",
        _siglip,
        (
            "vit_base_patch16_siglip_224",
            "vit_base_patch16_siglip_gap_224",
            "vit_large_patch16_siglip_256",
            "vit_so400m_patch14_siglip_384",
        ),
    ),
    Family(
        rf"eva02_({'|'.join(EVA02)})_patch(\d+)(_clip)?_(\d+)",
        _eva02,
        (
            *(f"eva02_{s}_patch14_224" for s in EVA02),
            *(f"eva02_{s}_patch14_336" for s in ("tiny", "small")),
            *(f"eva02_{s}_patch14_448" for s in ("base", "large")),
            "eva02_base_patch16_clip_224",
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
