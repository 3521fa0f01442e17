"""How a checkpoint's images were prepared, by the files beside it: transformers' and timm's words for `Preprocess`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

FILE = "preprocessor_config.json"
KERNELS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
OF_SHORTER = ("CLIP", "Bit")  # processors that mean the shorter side by a size that is one number
FIELDS = ("mean", "std", "crop_pct", "interpolation", "squash")  # of `preprocessing.Preprocess`


@dataclasses.dataclass(frozen=True)
class Pixels:
    """What the files say.

    Attributes:
      fields: some of `FIELDS`.
      size: (height, width) of what came out, where they say so.
      file: its name.
      notes: what they ask for and is not done.
    """

    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    size: tuple[int, int] | None = None
    file: str = ""
    notes: tuple[str, ...] = ()

    def lines(self, size: tuple[int, int]) -> list[str]:
        """For a report of a model of some size."""
        if not self.fields:
            return []
        words = ", ".join(f"{name}={value}" for name, value in self.fields.items())
        other = "" if self.size in (None, size) else f"; of {_by(self.size)} pixels, here of {_by(size)}"
        return [f"images are prepared as {self.file} says: {words}{other}", *self.notes]


def _by(size: tuple[int, int] | None) -> str:
    return "x".join(map(str, size or ()))


def of_own(said: Mapping[str, Any], file: str) -> Pixels:
    """What a run or a file of ours says of images, see `runs.of_images`; nothing of one that does not."""
    fields = {name: said["prepared"][name] for name in FIELDS if name in said.get("prepared", {})}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Pixels(fields, said.get("size"), file)


def told(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Pixels:
    """What `preprocessor_config.json` or else timm's `config.json` says of images, nothing of empty ones."""
    if processor:
        return _of_transformers(processor)
    return _of_timm(config) if "architecture" in config else Pixels()


def _of_timm(config: Mapping[str, Any]) -> Pixels:
    cfg = {**config, **(config.get("pretrained_cfg") or {})}
    found: dict[str, Any] = {name: tuple(map(float, cfg[name])) for name in ("mean", "std") if cfg.get(name)}
    found |= {"crop_pct": float(cfg["crop_pct"])} if cfg.get("crop_pct") else {}
    found |= {"squash": cfg["crop_mode"] == "squash"} if cfg.get("crop_mode") else {}
    size = tuple(cfg["input_size"][1:]) if len(cfg.get("input_size") or ()) == 3 else None
    return _pixels(found, cfg.get("interpolation"), size, "config.json")


def _of_transformers(given: Mapping[str, Any]) -> Pixels:
    kind = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "")
    found: dict[str, Any] = {}
    # Pixels times `rescale_factor`, less the mean, by the deviation; `Preprocess` takes them from 0 to 1.
    factor = float(given.get("rescale_factor", 1 / 255)) if given.get("do_rescale", True) else 1.0
    scale = 1.0 if abs(factor * 255 - 1) < 1e-6 else 1 / (255 * factor)
    if not given.get("do_normalize", True):
        found |= {"mean": (0.0,) * 3, "std": (scale,) * 3}
    elif "image_mean" in given and "image_std" in given:
        found |= {
            name: tuple(scale * float(value) for value in given[key])
            for name, key in (("mean", "image_mean"), ("std", "image_std"))
        }
    cut, size = given.get("do_center_crop", "crop_size" in given), given.get("size")
    crop = _sides(given.get("crop_size")) if cut else None
    if isinstance(size, int):
        size = {"shortest_edge": size} if kind.startswith(OF_SHORTER) else {"height": size, "width": size}
    size = dict(size or {})
    resized = _sides(size.get("shortest_edge")) or _sides(size)
    if given.get("do_resize", True) and resized is not None:
        found["squash"] = "shortest_edge" not in size
        found["crop_pct"] = min(1.0, crop[0] / resized[0]) if crop else 1.0
    kernel = KERNELS.get(given.get("resample", -1), given.get("resample"))
    return _pixels(found, kernel, crop or resized, FILE)


def _sides(size: Any) -> tuple[int, int] | None:
    if isinstance(size, Mapping):
        size = (size["height"], size["width"]) if {"height", "width"} <= size.keys() else None
    return (size, size) if isinstance(size, int) else tuple(map(int, size)) if size else None  # type: ignore[return-value]


def _pixels(found: dict[str, Any], kernel: Any, size: Any, file: str) -> Pixels:
    notes = ()
    if kernel in KERNELS.values():
        found["interpolation"] = kernel
    elif kernel is not None:
        notes = (f"{file} asks for resizing by {kernel!r}, which is not done: bicubic or bilinear is",)
    return Pixels(found, size, file, notes)


def processor_of(how: Any) -> dict[str, Any]:
    """What `preprocessor_config.json` says for a `Preprocess`, the inverse of `told`."""
    height, width = how.size
    tall, wide = int(height / how.crop_pct), int(width / how.crop_pct)
    whole = {"height": tall, "width": wide} if how.squash or height != width else {"shortest_edge": tall}
    return {
        "image_processor_type": "BitImageProcessor" if "shortest_edge" in whole else "DeiTImageProcessor",
        "do_resize": True,
        "size": whole,
        "resample": next(number for number, name in KERNELS.items() if name == how.interpolation),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
    }
