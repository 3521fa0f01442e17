"""Dynamic classifiers as their papers report them: cited, never measured here.

ImageNet, 224 pixels, top-1 in per cent at an average cost in 1e9 multiply-adds.
All are read in the DVT paper (Wang et al. 2021, arXiv 2105.15075). MSDNet, RANet
and IMTA are its own comparison at equal cost, of which the two ends are known to
us; so is the T2T-ViT-14 with adaptive depth (exits after some of its blocks).
"""

from __future__ import annotations

Curves = dict[str, tuple[tuple[float, float], ...]]
IMAGENET: Curves = {
    "DVT(T2T-ViT-12)": (
        *((0.75, 73.70), (1.00, 76.22), (1.25, 77.89)),
        *((1.50, 78.89), (1.75, 79.47), (2.00, 79.75)),
    ),
    "DVT(T2T-ViT-14)": ((2.0, 79.24), (2.5, 80.61), (3.0, 81.47), (3.5, 82.10), (4.0, 82.42)),
    "DVT(DeiT-S)": (
        *((2.37, 79.30), (2.41, 79.40), (2.60, 79.81)),
        *((2.90, 80.40), (3.61, 81.20), (4.63, 81.67)),
    ),
    "MSDNet": ((0.75, 69.82), (2.00, 74.20)),
    "IMTA": ((0.75, 70.84), (2.00, 74.94)),
    "RANet": ((0.75, 70.48), (2.00, 75.10)),
    "adaptive-depth T2T-ViT-14": ((2.0, 76.09), (4.0, 79.55)),
}


def rows(data_set: str) -> Curves:
    """The published curves for a data set, by model.

    Raises:
      ValueError: for anything but ImageNet, where they would compare nothing.
    """
    if not data_set.split("/")[0].split(":")[0].startswith("imagenet2012"):
        raise ValueError(
            f"the published curves are ImageNet at 224 pixels, this run is on {data_set}: leave --published out"
        )
    return IMAGENET
