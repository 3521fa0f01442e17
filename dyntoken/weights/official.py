"""The official model classes and what each is in this library, by repository and class name."""

from __future__ import annotations

from dyntoken.weights import official_blockwise, official_clustering, official_isotropic, official_staged
from dyntoken.weights.constructors import Official, Reference, Values
from dyntoken.weights.errors import WeightsError

OFFICIAL: dict[str, Official] = {
    **official_isotropic.CLASSES,
    **official_blockwise.CLASSES,
    **official_clustering.CLASSES,
    **official_staged.CLASSES,
}
# Recognised in the repository string, in this order; a composition names two.
REPOSITORIES = (
    ("lvvit", ("tokenlabeling",)),
    ("tokenreduction", ("tokenreduction",)),
    ("ats", ("adaptivetokensampling",)),
    ("spvit", ("spvit",)),
    ("psvit", ("ps-vit",)),
    ("pvt", ("whai362/pvt",)),
    ("cvt", ("microsoft/cvt",)),
    ("evovit", ("evo-vit",)),
    ("avit", ("a-vit",)),
    ("adavit", ("adavit",)),
    ("ltmp", ("ltmp",)),
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
    ("deit", ("facebookresearch/deit",)),
)


def find_reference(repository: str, cls: str) -> str:
    """Row of `OFFICIAL` for a repository string and a class name.

    Raises:
      WeightsError: unknown repository or class.
    """
    text = repository.lower()
    for name, parts in REPOSITORIES:
        if all(part in text for part in parts):
            # A class may be given with its file and with its module: "models/pvt.py PVT", "pvt.PVT".
            first = next((word for word in cls.split() if "/" not in word), cls)
            row = f"{name}/{first.rsplit('.', 1)[-1]}"
            if row in OFFICIAL:
                return row
            known = [other for other in OFFICIAL if other.startswith(f"{name}/")]
            raise WeightsError(f"class {cls!r} of {repository} cannot be imported; known: {', '.join(known)}")
    known = sorted({row.split("/")[0] for row in OFFICIAL})
    raise WeightsError(f"repository {repository!r} cannot be imported; known: {', '.join(known)}")


def build(repository: str, cls: str, constructor: Values) -> Reference:
    """The model that equals an official class with these constructor arguments."""
    row = find_reference(repository, cls)
    given = dict(constructor)
    if row == "tps/DynamicVit" and " with TPSModule" in cls:
        given.setdefault("token_merge_module", "TPSModule()")
    return OFFICIAL[row].build(row.split("/")[1], given)
