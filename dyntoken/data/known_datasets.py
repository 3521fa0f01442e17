"""What is known of the common data sets without reading them.

`info` answers from here for a set that is not prepared, so that a dry run of
an ImageNet recipe needs no ImageNet. Mean and standard deviation are those the
published recipes use.
"""

from __future__ import annotations

from dyntoken.data.info import DataInfo

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Of the 60,000 training images. The embedded subset uses the same numbers, so
# that weights trained on the full set fit it.
FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)


def _card(name, classes, shape, train, held_out, mean, std, names=()) -> DataInfo:
    return DataInfo(name, classes, shape, {"train": train, **held_out}, mean, std, names)


_MINI = _card(
    "fashion_mnist_mini",
    10,
    (28, 28, 1),
    10_000,
    {"test": 2_000},
    FASHION_MEAN,
    FASHION_STD,
    FASHION_NAMES,
)
_FASHION = _card(
    "fashion_mnist", 10, (28, 28, 1), 60_000, {"test": 10_000}, FASHION_MEAN, FASHION_STD, FASHION_NAMES
)
_CIFAR10 = _card(
    "cifar10",
    10,
    (32, 32, 3),
    50_000,
    {"test": 10_000},
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
    CIFAR10_NAMES,
)
_CIFAR100 = _card(
    "cifar100",
    100,
    (32, 32, 3),
    50_000,
    {"test": 10_000},
    (0.5071, 0.4865, 0.4409),
    (0.2673, 0.2564, 0.2762),
)
_IMAGENET = _card("imagenet2012", 1000, None, 1_281_167, {"validation": 50_000}, IMAGENET_MEAN, IMAGENET_STD)

_REAL = DataInfo(
    "imagenet2012_real",
    1000,
    None,
    {"validation": 50_000},
    IMAGENET_MEAN,
    IMAGENET_STD,
    several_labels=True,
)
_V2 = DataInfo("imagenet_v2", 1000, None, {"test": 10_000}, IMAGENET_MEAN, IMAGENET_STD)
_INAT = _card("i_naturalist2019", 1010, None, 265_213, {"validation": 3_030}, IMAGENET_MEAN, IMAGENET_STD)

CARDS = {c.name: c for c in (_MINI, _FASHION, _CIFAR10, _CIFAR100, _IMAGENET, _REAL, _V2, _INAT)}


def default_moments(name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std): the card's, ImageNet's for other colour sets, else 0.5."""
    card = CARDS.get(name)
    if card is not None and card.channels == channels:
        return card.mean, card.std
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (0.5,) * channels, (0.5,) * channels
