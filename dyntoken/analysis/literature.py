"""Dynamic classifiers as their papers report them: cited, never measured here.

ImageNet, 224 pixels, top-1 in per cent at an average cost in 1e9 multiply-adds.
"""

from __future__ import annotations

import dataclasses

DVT_PAPER = "Wang et al. 2021, arXiv 2105.15075"


@dataclasses.dataclass(frozen=True)
class Published:
    """One curve of a paper.

    Attributes:
      name: of the model.
      points: (average cost in GMACs, top-1 in per cent).
      source: the paper the numbers were read in.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    source: str


# MSDNet, RANet and IMTA are the DVT paper's own comparison at equal cost, of which the two ends are known to
# us; so is the T2T-ViT-14 with adaptive depth (exits after some of its blocks).
IMAGENET = (
    Published(
        "DVT(T2T-ViT-12)",
        ((0.75, 73.70), (1.00, 76.22), (1.25, 77.89), (1.50, 78.89), (1.75, 79.47), (2.00, 79.75)),
        DVT_PAPER,
    ),
    Published(
        "DVT(T2T-ViT-14)", ((2.0, 79.24), (2.5, 80.61), (3.0, 81.47), (3.5, 82.10), (4.0, 82.42)), DVT_PAPER
    ),
    Published(
        "DVT(DeiT-S)",
        ((2.37, 79.30), (2.41, 79.40), (2.60, 79.81), (2.90, 80.40), (3.61, 81.20), (4.63, 81.67)),
        DVT_PAPER,
    ),
    Published("MSDNet", ((0.75, 69.82), (2.00, 74.20)), DVT_PAPER),
    Published("IMTA", ((0.75, 70.84), (2.00, 74.94)), DVT_PAPER),
    Published("RANet", ((0.75, 70.48), (2.00, 75.10)), DVT_PAPER),
    Published("adaptive-depth T2T-ViT-14", ((2.0, 76.09), (4.0, 79.55)), DVT_PAPER),
)


def rows(data_set: str) -> tuple[Published, ...]:
    """The published curves for a data set.

    Raises:
      ValueError: for anything but ImageNet, where they would compare nothing.
    """
    if not data_set.split("/")[0].split(":")[0].startswith("imagenet2012"):
        raise ValueError(
            f"the published curves are ImageNet at 224 pixels, this run is on {data_set}: leave --published out"
        )
    return IMAGENET
