"""Official model classes and what they are in this library.

One table: repository and class name -> a builder that reads the class's own
constructor arguments. Every argument is read, or must have the one value that
this library implements; an unknown argument is an error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dyntoken.models import Model
from dyntoken.registry import Table, suggest
from dyntoken.weights.files import WeightsError

# Recognised in the repository string, in this order; a composition names two.
REPOSITORIES = (
    ("lvvit", ("tokenlabeling",)),
    ("psvit", ("ps-vit",)),
    ("pvt", ("whai362/pvt",)),
    ("cvt", ("microsoft/cvt",)),
    ("evit+tps", ("evit", "tps")),
    ("evit", ("evit",)),
    ("tps", ("tps",)),
    ("dynamicvit", ("dynamicvit",)),
    ("t2t", ("t2t-vit",)),
    ("dvt", ("dynamic-vision-transformer",)),
    ("swin", ("swin-transformer",)),
    ("convnext", ("convnext",)),
    ("timm", ("timm",)),
    ("timm", ("pytorch-image-models",)),
    ("timm", ("facebookresearch/deit",)),
)
REFERENCES = Table(
    "reference class",
    {
        "timm/VisionTransformer": "dyntoken.weights.reference_vit:timm_vit",
        "timm/VisionTransformerDistilled": "dyntoken.weights.reference_vit:timm_vit_distilled",
        "dynamicvit/VisionTransformerDiffPruning": "dyntoken.weights.reference_vit:dynamicvit",
        "dynamicvit/VisionTransformerTeacher": "dyntoken.weights.reference_vit:dynamicvit_teacher",
        "tps/DynamicVit": "dyntoken.weights.reference_vit:tps",
        "lvvit/LV_ViT": "dyntoken.weights.reference_lvvit:lvvit",
        "dynamicvit/LVViTDiffPruning": "dyntoken.weights.reference_lvvit:dynamicvit",
        "dynamicvit/LVViT_Teacher": "dyntoken.weights.reference_lvvit:teacher",
        "psvit/PSViT": "dyntoken.weights.reference_psvit:psvit",
        "cvt/ConvolutionalVisionTransformer": "dyntoken.weights.reference_cvt:cvt",
        "pvt/PyramidVisionTransformer": "dyntoken.weights.reference_pvt:pvt",
        "swin/SwinTransformer": "dyntoken.weights.reference_swin:swin",
        "timm/SwinTransformer": "dyntoken.weights.reference_swin:timm",
        "dynamicvit/AdaSwinTransformer": "dyntoken.weights.reference_swin:dynamicvit",
        "dynamicvit/SwinTransformer_Teacher": "dyntoken.weights.reference_swin:teacher",
        "convnext/ConvNeXt": "dyntoken.weights.reference_convnext:convnext",
        "timm/ConvNeXt": "dyntoken.weights.reference_convnext:timm",
        "dynamicvit/AdaConvNeXt": "dyntoken.weights.reference_convnext:dynamicvit",
        "dynamicvit/ConvNeXt": "dyntoken.weights.reference_convnext:convnext",
        "dynamicvit/ConvNeXt_Teacher": "dyntoken.weights.reference_convnext:teacher",
        "evit/EViT": "dyntoken.weights.reference_vit:evit",
        "evit+tps/EViT": "dyntoken.weights.reference_vit:etps",
        "t2t/T2T_ViT": "dyntoken.weights.reference_t2t:t2t",
        "dvt/DVT_Deit_small_model": "dyntoken.weights.reference_dvt:deit",
        "dvt/DVT_T2t_vit_12_model": "dyntoken.weights.reference_dvt:t2t_12",
        "dvt/DVT_T2t_vit_14_model": "dyntoken.weights.reference_dvt:t2t_14",
    },
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """An official model in this library's terms.

    Attributes:
      model: the equivalent model.
      grid_only: number of prefix rows that the reference's position embedding
        lacks (`no_embed_class`), else 0.
    """

    model: Model
    grid_only: int = 0


def find_reference(repository: str, cls: str) -> str:
    """Row of `REFERENCES` for a repository string and a class name.

    Raises:
      WeightsError: unknown repository or class.
    """
    text = repository.lower()
    for name, parts in REPOSITORIES:
        if all(part in text for part in parts):
            # A class may be given with its file and with its module: "models/pvt.py PVT", "pvt.PVT".
            first = next((word for word in cls.split() if "/" not in word), cls)
            row = f"{name}/{first.rsplit('.', 1)[-1]}"
            if row in REFERENCES:
                return row
            known = [other for other in REFERENCES if other.startswith(f"{name}/")]
            raise WeightsError(f"class {cls!r} of {repository} cannot be imported; known: {', '.join(known)}")
    known = sorted({row.split("/")[0] for row in REFERENCES})
    raise WeightsError(f"repository {repository!r} cannot be imported; known: {', '.join(known)}")


def build(repository: str, cls: str, constructor: Mapping[str, Any]) -> Reference:
    """The model that equals an official class with these constructor arguments."""
    row = find_reference(repository, cls)
    given = dict(constructor)
    if row == "tps/DynamicVit" and " with TPSModule" in cls:
        given.setdefault("token_merge_module", "TPSModule()")
    return REFERENCES[row](given)


class Arguments:
    """Constructor arguments of an official class, defaults filled in."""

    def __init__(self, cls: str, given: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.cls = cls
        for name in given:
            if name not in defaults:
                raise WeightsError(f"{cls} has no constructor argument {name!r}: {suggest(name, defaults)}")
        self._values = {**defaults, **given}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def only(self, **allowed: Sequence[Any]) -> None:
        """Refuses values that this library does not implement."""
        for name, values in allowed.items():
            if self[name] not in values:
                raise WeightsError(
                    f"{self.cls}({name}={self[name]!r}) cannot be imported: only "
                    f"{' or '.join(repr(value) for value in values)} is implemented"
                )

    def number(self, name: str) -> float:
        return float(self[name])

    def size(self, name: str) -> int | tuple[int, int]:
        """An int, or (height, width)."""
        value = self[name]
        return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else int(value)

    def flag(self, name: str) -> bool:
        """A bool; also in the words of a case description ("True for ...", "not used")."""
        value = self[name]
        if isinstance(value, str):
            for start, meaning in (("true", True), ("false", False), ("not used", False)):
                if value.lower().startswith(start):
                    return meaning
            raise WeightsError(f"{self.cls}({name}={value!r}): give True or False")
        return bool(value)

    def epsilon(self, default: float) -> float:
        """LayerNorm epsilon of `norm_layer`: None, or text such as "LayerNorm(eps=1e-6)"."""
        value = self["norm_layer"]
        if value is None:
            return default
        if not re.search(r"\bLayerNorm\b", str(value)):
            raise WeightsError(
                f"{self.cls}(norm_layer={value!r}) cannot be imported: only LayerNorm is implemented"
            )
        found = re.search(r"eps\s*=\s*([0-9.eE+-]+)", str(value))
        return float(found.group(1)) if found else 1e-5  # torch's own default
